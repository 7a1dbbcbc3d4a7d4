"""Images and clips: codecs, deblurring and flows that work in frequencies or by scans."""
