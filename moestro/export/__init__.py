"""Floor 10: models that leave the house, in Hugging Face's format. Importing this registers them with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moestro.export.configuration import MoestroConfig
from moestro.export.modeling import MoestroForCausalLM, MoestroModel
from moestro.export.opening import Opened, open_model

AutoConfig.register(MoestroConfig.model_type, MoestroConfig, exist_ok=True)
AutoModel.register(MoestroConfig, MoestroModel, exist_ok=True)
AutoModelForCausalLM.register(MoestroConfig, MoestroForCausalLM, exist_ok=True)

__all__ = ["MoestroConfig", "MoestroForCausalLM", "MoestroModel", "Opened", "open_model"]
