"""Multi-head latent attention and its tensor-parallel form."""
