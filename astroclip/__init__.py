"""AstroCLIP: galaxy images and optical spectra in one embedding space.

Importing this package is cheap: torch is loaded only with `astroclip.models` and `astroclip.embed`.
"""

__version__ = "0.1.0"
