"""The models that lmms-eval finds here: module name -> class in it."""

AVAILABLE_MODELS = {"llava_reduced": "LlavaReduced", "reduced": "Reduced"}
