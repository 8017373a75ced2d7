"""Simulated survey: physical galaxies with known properties, as images and spectra in Multimodal Universe layout."""
