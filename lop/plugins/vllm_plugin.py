"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): tells it of LOP's architectures."""


def register() -> None:
    """Registers the models of `lop.plugins.vllm_model`, by name: they are imported when a checkpoint asks for them."""
    from vllm import ModelRegistry

    for name in ("LopQwen2_5_VLForConditionalGeneration", "LopQwen2ForCausalLM"):
        ModelRegistry.register_model(name, f"lop.plugins.vllm_model:{name}")
