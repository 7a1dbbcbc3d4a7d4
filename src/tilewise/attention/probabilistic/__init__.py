"""Li (2024, arXiv 2410.18441): drawn blocks, rotary and linear positions combined, caches of falling precision."""
