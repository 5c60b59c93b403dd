"""Gaps of the model classes of SGLang 0.5.22 and 0.5.23, most of them in mixes of algorithms, by architecture.

Read from their sources: ``tests/unit/test_stock_models.py`` reads them again and compares.
"""

from __future__ import annotations

_BOTH = """
    AfmoeForCausalLM
    BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration
    Cohere2ForCausalLM
    CohereForCausalLM
    Cosmos3ForConditionalGeneration
    DFlashLagunaForCausalLM
    DeepseekForCausalLM
    DeepseekOCRForCausalLM
    DeepseekVL2ForCausalLM
    DotsOCRForCausalLM
    Ernie4_5_VLMoeForConditionalGeneration
    ExaoneForCausalLM
    ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM
    FalconH1ForCausalLM
    Gemma3nForCausalLM
    Glm4ForCausalLM
    Glm4MoeForCausalLM
    Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration
    GlmAsrForConditionalGeneration
    GlmImageForConditionalGeneration
    GlmMoeDsaForCausalLM
    GlmOcrForConditionalGeneration
    GraniteForCausalLM
    GraniteSWAForCausalLM
    Grok1ForCausalLM
    Grok1ModelForCausalLM
    HYV3ForCausalLM
    IQuestCoderForCausalLM
    IQuestLoopCoderForCausalLM
    IQuestQ1ForCausalLM
    InklingForConditionalGeneration
    InternLM3ForCausalLM
    InternS1ForConditionalGeneration
    InternS1ProForConditionalGeneration
    JetNemotronForCausalLM
    JetVLMForConditionalGeneration
    KimiLinearForCausalLM
    Lfm2MoeForCausalLM
    LightOnOCRForConditionalGeneration
    LlamaForCausalLM
    LlavaForConditionalGeneration
    LlavaLlamaForCausalLM
    LlavaMistralForCausalLM
    LlavaQwenForCausalLM
    LlavaVidForCausalLM
    LocateAnythingForConditionalGeneration
    MiMoForCausalLM
    MiMoV2ASRForCausalLM
    MiMoV2FlashForCausalLM
    MiMoV2ForCausalLM
    MiniCPMForCausalLM
    MiniCPMSALAForCausalLM
    Ministral3ForCausalLM
    Mistral3ForConditionalGeneration
    MistralForCausalLM
    MllamaForConditionalGeneration
    MossVLForConditionalGeneration
    NVILAForConditionalGeneration
    NVILALiteForConditionalGeneration
    NanbeigeForCausalLM
    Olmo2ForCausalLM
    OlmoForCausalLM
    OrionForCausalLM
    Phi3ForCausalLM
    PixtralForConditionalGeneration
    Qwen2AudioForConditionalGeneration
    Qwen2ForCausalLM
    Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration
    Qwen3ForCausalLM
    Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration
    SDARForCausalLM
    Sarashina2VisionForCausalLM
    SolarForCausalLM
    StableLmForCausalLM
    Step3VLForConditionalGeneration
    Step3p5ForCausalLM
    Step3p7ForConditionalGeneration
    StepVLForConditionalGeneration
    TeleFLMForCausalLM
    TorchNativeLlamaForCausalLM
    TorchNativePhi3ForCausalLM
    UnlimitedOCRForCausalLM
    VoxtralForConditionalGeneration
    XverseForCausalLM
    XverseMoeForCausalLM
    YiVLForCausalLM
"""

_QKV = """
    ApertusForCausalLM
    ArceeForCausalLM
    Cosmos3EdgeForConditionalGeneration
    GPTJForCausalLM
    GptOssForCausalLM
    GraniteMoeForCausalLM
    GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM
    Lfm2ForCausalLM
    Lfm2VlForConditionalGeneration
    MixtralForCausalLM
    OPTForCausalLM
    OlmoeForCausalLM
    PhiMoEForCausalLM
    QuantMixtralForCausalLM
    Qwen2_5_VLForConditionalGeneration
    SDARMoeForCausalLM
    Starcoder2ForCausalLM
    WhisperForConditionalGeneration
"""

_GATE_UP = """
    BailingMM2NativeForConditionalGeneration
    BailingMMNativeForConditionalGeneration
    BailingMoEForCausalLM
    BailingMoeForCausalLM
    BailingMoeV2ForCausalLM
    DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM
    Dots3NoteForCausalLM
    DotsVLMForCausalLM
    Eagle3DeepseekV2ForCausalLM
    Glm4MoeLiteForCausalLM
    HrmTextForCausalLM
    InternLM2ForCausalLM
    KimiK25ForConditionalGeneration
    KimiK3LinearForCausalLM
    KimiVLForConditionalGeneration
    LongcatFlashForCausalLM
    MiniCPM3ForCausalLM
    MistralLarge3ForCausalLM
    SarvamMLAForCausalLM
    SarvamMoEForCausalLM
    Spark2_5ForCausalLM
"""

UNMAPPED_LAYERS: dict[str, frozenset[str]] = {
    name: frozenset(layers)
    for names, layers in (
        (_BOTH, ("qkv_proj", "gate_up_proj")),
        (_QKV, ("qkv_proj",)),
        (_GATE_UP, ("gate_up_proj",)),
    )
    for name in names.split()
}
"""Fused layers whose shards the class does not name in a ``packed_modules_mapping``, so that SGLang ignores a mix's entries for the
shards. Of the newest tested version."""

_UNMAPPED_BEFORE: dict[str, dict[str, frozenset[str]]] = {
    "0.5.22": {"MiniCPMV4_6ForConditionalGeneration": frozenset({"qkv_proj", "gate_up_proj"})},
}
"""The classes without a mapping in an older tested version that have one in the newest, by version."""


def unmapped_in(version: str) -> dict[str, frozenset[str]]:
    """Return the fused layers without a mapping (:data:`UNMAPPED_LAYERS`) in a version of SGLang, by architecture."""
    return {**UNMAPPED_LAYERS, **_UNMAPPED_BEFORE.get(version, {})}


MODELS_THAT_RENAME_BLOCK_SCALES = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "GigaChat35ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "HYV4ForCausalLM",
        "KimiK3ForConditionalGeneration",
        "KimiK3LinearForCausalLM",
        "MistralLarge3ForCausalLM",
    }
)
"""Architectures whose loader accepts ``weight_scale`` for FP8 block scales, beside SGLang's ``weight_scale_inv``."""

MODELS_WITH_PACKED_EXPERTS = frozenset({"GptOssForCausalLM"})
"""Architectures that load experts as one tensor for all of a layer, quantized or not, by a loader that takes no such tensor under a
configuration with ``modelopt`` in its name."""
