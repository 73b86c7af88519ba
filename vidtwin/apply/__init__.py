"""A trained autoencoder on one's own videos: each command of it is a file here."""
