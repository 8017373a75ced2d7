"""The two towers and the model that joins them, as `transformers` classes registered with the Auto factories."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from astroclip.models.configuration import PRESETS, AstroCLIPConfig, ImageTowerConfig, SpectrumTowerConfig
from astroclip.models.image_tower import ImageTower
from astroclip.models.model import AstroCLIPModel
from astroclip.models.processor import AstroCLIPProcessor
from astroclip.models.spectrum_tower import SpectrumTower

AutoConfig.register("astroclip", AstroCLIPConfig, exist_ok=True)
AutoModel.register(AstroCLIPConfig, AstroCLIPModel, exist_ok=True)
AutoProcessor.register(AstroCLIPConfig, AstroCLIPProcessor, exist_ok=True)

__all__ = [
    "PRESETS",
    "AstroCLIPConfig",
    "AstroCLIPModel",
    "AstroCLIPProcessor",
    "ImageTower",
    "ImageTowerConfig",
    "SpectrumTower",
    "SpectrumTowerConfig",
]
