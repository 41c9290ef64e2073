"""Small facts about families: which ones transformers lacks, and how the outliers are made to keep the contract.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` read checkpoints of DeepSeekMoE version 1.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from moeprune.models.runtime.contract import to_contract
from moeprune.models.runtime.deepseek_v1 import DeepseekConfig, DeepseekForCausalLM

__all__ = ["to_contract"]

# Experts lie in its checkpoints under the same keys, one by one, as in those of Qwen2-MoE.
register_checkpoint_conversion_mapping(
    DeepseekConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
