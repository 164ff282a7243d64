"""The methods by name. A new method is one file here and one word in this line."""

from models.methods import fsbbt, kd, tint, wecolora, wecolora_features, wecolora_segmentation
from models.pipeline import registry

METHODS = registry(
    kd.METHOD,
    fsbbt.METHOD,
    tint.METHOD,
    wecolora.METHOD,
    wecolora_features.METHOD,
    wecolora_segmentation.METHOD,
)
