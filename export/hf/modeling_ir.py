"""Informed routing for transformers models. This file travels with the checkpoint; it needs only torch and transformers.

Each unit (attention, MLP) of each layer sees the normalised hidden states h and decides for every token:

    unit(h) if score(h) > threshold else forecast(h)

Only executed tokens are computed: they are gathered, run through the unit, and put back into the forecast. Keys and
values are computed for every token, so that later tokens can attend to it; with ``config.kv_cache`` "strict", for executed
tokens only. A unit that is not routed is the base model's own. ``model.set_sparsity(0.3)`` moves the threshold; at 0 the
model is the dense one. Decisions are deterministic.
"""

from torch import Tensor
from torch.nn import functional as F
from transformers.models.exaone4.modeling_exaone4 import (
    Exaone4Attention,
    Exaone4ForCausalLM,
    Exaone4MLP,
    Exaone4RMSNorm,
)
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaForCausalLM, GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2ForCausalLM, Gemma2MLP, Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3ForCausalLM, Gemma3MLP, Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteAttention, GraniteForCausalLM, GraniteMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2ForCausalLM, Olmo2MLP, Olmo2RMSNorm
from transformers.models.olmo3.modeling_olmo3 import Olmo3Attention, Olmo3ForCausalLM, Olmo3MLP, Olmo3RMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeForCausalLM, OlmoeSparseMoeBlock
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3ForCausalLM, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
)
from transformers.models.seed_oss.modeling_seed_oss import SeedOssAttention, SeedOssForCausalLM, SeedOssMLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3ForCausalLM, SmolLM3MLP

from .attention_ir import RoutedAttention, RoutedPackedAttention
from .configuration_ir import CONFIGS
from .control_ir import (
    SparsityControl as SparsityControl,
)  # version 4 of transformers copies just what this file imports
from .informed_ir import InformedRouting
from .mixtures_ir import InformedMixture, put_together, without_scores
from .routed_ir import PostNorm, RoutedExperts, RoutedMLP


class IRLlamaAttention(RoutedAttention, LlamaAttention): ...  # type: ignore[misc]


class IRLlamaMLP(RoutedMLP, LlamaMLP): ...


class IRLlamaForCausalLM(InformedRouting, LlamaForCausalLM):
    config_class = CONFIGS["ir_llama"]
    attention, mlp = IRLlamaAttention, IRLlamaMLP


class IRMistralAttention(RoutedAttention, MistralAttention): ...


class IRMistralMLP(RoutedMLP, MistralMLP): ...


class IRMistralForCausalLM(InformedRouting, MistralForCausalLM):
    config_class = CONFIGS["ir_mistral"]
    attention, mlp = IRMistralAttention, IRMistralMLP


class IRQwen2Attention(RoutedAttention, Qwen2Attention): ...


class IRQwen2MLP(RoutedMLP, Qwen2MLP): ...


class IRQwen2ForCausalLM(InformedRouting, Qwen2ForCausalLM):
    config_class = CONFIGS["ir_qwen2"]
    attention, mlp = IRQwen2Attention, IRQwen2MLP


class IRQwen3Attention(RoutedAttention, Qwen3Attention): ...


class IRQwen3MLP(RoutedMLP, Qwen3MLP): ...


class IRQwen3ForCausalLM(InformedRouting, Qwen3ForCausalLM):
    config_class = CONFIGS["ir_qwen3"]
    attention, mlp = IRQwen3Attention, IRQwen3MLP


class IRGemma2Attention(RoutedAttention, Gemma2Attention):  # type: ignore[misc]
    @property
    def softcap(self) -> float | None:  # type: ignore[override]
        return self.config.attn_logit_softcapping


class IRGemma2MLP(RoutedMLP, Gemma2MLP): ...


class IRGemma2RMSNorm(PostNorm, Gemma2RMSNorm): ...


class IRGemma2ForCausalLM(InformedRouting, Gemma2ForCausalLM):
    config_class = CONFIGS["ir_gemma2"]
    attention, mlp = IRGemma2Attention, IRGemma2MLP
    post_norm = IRGemma2RMSNorm
    _supports_sdpa = False  # it has no soft cap, and drops it in silence


class IRGemma3Attention(RoutedAttention, Gemma3Attention): ...  # type: ignore[misc]


class IRGemma3MLP(RoutedMLP, Gemma3MLP): ...


class IRGemma3RMSNorm(PostNorm, Gemma3RMSNorm): ...


class IRGemma3ForCausalLM(InformedRouting, Gemma3ForCausalLM):
    config_class = CONFIGS["ir_gemma3_text"]
    attention, mlp = IRGemma3Attention, IRGemma3MLP
    post_norm = IRGemma3RMSNorm


class IRPhi3Attention(RoutedPackedAttention, Phi3Attention): ...  # type: ignore[misc]


class IRPhi3MLP(RoutedMLP, Phi3MLP): ...


class IRPhi3ForCausalLM(InformedRouting, Phi3ForCausalLM):
    config_class = CONFIGS["ir_phi3"]
    attention, mlp = IRPhi3Attention, IRPhi3MLP


class IROlmo2Attention(RoutedAttention, Olmo2Attention):
    normed, whole_norm = False, True


class IROlmo2MLP(RoutedMLP, Olmo2MLP):
    normed = False


class IROlmo2RMSNorm(PostNorm, Olmo2RMSNorm): ...


class IROlmo2ForCausalLM(InformedRouting, Olmo2ForCausalLM):
    config_class = CONFIGS["ir_olmo2"]
    attention, mlp = IROlmo2Attention, IROlmo2MLP
    post_norm = IROlmo2RMSNorm


class IRSmolLM3Attention(RoutedAttention, SmolLM3Attention): ...


class IRSmolLM3MLP(RoutedMLP, SmolLM3MLP): ...


class IRSmolLM3ForCausalLM(InformedRouting, SmolLM3ForCausalLM):
    config_class = CONFIGS["ir_smollm3"]
    attention, mlp = IRSmolLM3Attention, IRSmolLM3MLP


class IRGraniteAttention(RoutedAttention, GraniteAttention): ...  # type: ignore[misc]


class IRGraniteMLP(RoutedMLP, GraniteMLP): ...


class IRGraniteForCausalLM(InformedRouting, GraniteForCausalLM):
    config_class = CONFIGS["ir_granite"]
    attention, mlp = IRGraniteAttention, IRGraniteMLP


class IRQwen3MoeAttention(RoutedAttention, Qwen3MoeAttention): ...


class IRQwen3MoeMLP(RoutedExperts, Qwen3MoeSparseMoeBlock): ...


class IRQwen3MoeForCausalLM(InformedMixture, Qwen3MoeForCausalLM):
    config_class = CONFIGS["ir_qwen3_moe"]
    attention, mlp = IRQwen3MoeAttention, IRQwen3MoeMLP
    forward = without_scores(Qwen3MoeForCausalLM.forward)


class IRMixtralAttention(RoutedAttention, MixtralAttention): ...


class IRMixtralMLP(RoutedExperts, MixtralSparseMoeBlock): ...


class IRMixtralForCausalLM(InformedMixture, MixtralForCausalLM):
    config_class = CONFIGS["ir_mixtral"]
    attention, mlp = IRMixtralAttention, IRMixtralMLP
    forward = without_scores(MixtralForCausalLM.forward)
    since = 5


class IROlmoeAttention(RoutedAttention, OlmoeAttention):  # type: ignore[misc]
    whole_norm = True


class IROlmoeMLP(RoutedExperts, OlmoeSparseMoeBlock): ...


class IROlmoeForCausalLM(InformedMixture, OlmoeForCausalLM):
    config_class = CONFIGS["ir_olmoe"]
    attention, mlp = IROlmoeAttention, IROlmoeMLP
    forward = without_scores(OlmoeForCausalLM.forward)
    since = 5


class IRSeedOssAttention(RoutedAttention, SeedOssAttention):  # type: ignore[misc]
    def project_out(self, attended: Tensor) -> Tensor:
        return F.dropout(self.o_proj(attended), self.residual_dropout, self.training)


class IRSeedOssMLP(RoutedMLP, SeedOssMLP): ...


class IRSeedOssForCausalLM(InformedRouting, SeedOssForCausalLM):
    config_class = CONFIGS["ir_seed_oss"]
    attention, mlp = IRSeedOssAttention, IRSeedOssMLP


class IRGemmaAttention(RoutedAttention, GemmaAttention): ...  # type: ignore[misc]


class IRGemmaMLP(RoutedMLP, GemmaMLP): ...


class IRGemmaForCausalLM(InformedRouting, GemmaForCausalLM):
    config_class = CONFIGS["ir_gemma"]
    attention, mlp = IRGemmaAttention, IRGemmaMLP


class IROlmo3Attention(RoutedAttention, Olmo3Attention):
    normed, whole_norm = False, True


class IROlmo3MLP(RoutedMLP, Olmo3MLP):
    normed = False


class IROlmo3RMSNorm(PostNorm, Olmo3RMSNorm): ...


class IROlmo3ForCausalLM(InformedRouting, Olmo3ForCausalLM):
    config_class = CONFIGS["ir_olmo3"]
    attention, mlp = IROlmo3Attention, IROlmo3MLP
    post_norm = IROlmo3RMSNorm


class IRExaone4Attention(RoutedAttention, Exaone4Attention):  # type: ignore[misc]
    normed = False

    @property
    def use_rope(self) -> bool:
        return self.sliding_window is None or self.is_sliding


class IRExaone4MLP(RoutedMLP, Exaone4MLP):
    normed = False


class IRExaone4RMSNorm(PostNorm, Exaone4RMSNorm): ...


class IRExaone4ForCausalLM(InformedRouting, Exaone4ForCausalLM):
    config_class = CONFIGS["ir_exaone4"]
    attention, mlp = IRExaone4Attention, IRExaone4MLP
    post_norm = IRExaone4RMSNorm


MODELS = (
    IRLlamaForCausalLM,
    IRMistralForCausalLM,
    IRQwen2ForCausalLM,
    IRQwen3ForCausalLM,
    IRGemma2ForCausalLM,
    IRGemma3ForCausalLM,
    IRPhi3ForCausalLM,
    IROlmo2ForCausalLM,
    IRSmolLM3ForCausalLM,
    IRGraniteForCausalLM,
    IRSeedOssForCausalLM,
    IRGemmaForCausalLM,
    IROlmo3ForCausalLM,
    IRExaone4ForCausalLM,
    IRQwen3MoeForCausalLM,
    IRMixtralForCausalLM,
    IROlmoeForCausalLM,
)
for _model in MODELS:
    _model.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained copies this file
for _family in ("qwen3_moe", "mixtral", "olmoe"):
    put_together(_family)
