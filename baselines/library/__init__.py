"""Autoencoders of diffusers and transformers behind the interface; an adapter imports its library when it is built."""
