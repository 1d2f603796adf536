"""Names of the same tensors in other libraries, where they differ from torchvision's."""

_TIMM_VIT = {
    "class_token": "cls_token",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
}
_TIMM_VIT_BLOCK = {
    "ln_1": "norm1",
    "self_attention.in_proj": "attn.qkv",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
_BLOCK = "encoder.layers.encoder_layer_"


def timm_vit(name: str) -> str:
    """timm's name of a tensor of torchvision's VisionTransformer; MoCo v3's ViTs have them too.

    Raises:
        KeyError: there is no such tensor.
    """
    if not name.startswith(_BLOCK):
        return _TIMM_VIT[name]
    index, layer, kind = _in_block(name)
    return f"blocks.{index}.{_TIMM_VIT_BLOCK[layer]}.{kind}"


def detectron2_resnet(name: str) -> str:
    """detectron2's name of a tensor of torchvision's ResNet, as its own converter changes it."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
    for number in (1, 2, 3):
        name = name.replace(f"bn{number}.", f"conv{number}.norm.")
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def huggingface_resnet(name: str) -> str:
    """transformers' name of a tensor of torchvision's ResNet."""
    for kind, theirs in (("conv", "convolution"), ("bn", "normalization")):
        if name.startswith(f"{kind}1."):
            return f"embedder.embedder.{theirs}.{name.partition('.')[2]}"
    layer, block, part, rest = name.split(".", 3)
    place = f"encoder.stages.{int(layer.removeprefix('layer')) - 1}.layers.{block}"
    if part == "downsample":
        number, _, tensor = rest.partition(".")
        return f"{place}.shortcut.{('convolution', 'normalization')[int(number)]}.{tensor}"
    theirs = "convolution" if part.startswith("conv") else "normalization"
    return f"{place}.layer.{int(part[-1]) - 1}.{theirs}.{rest}"


_HUGGINGFACE_VIT = {
    "class_token": "embeddings.cls_token",
    "conv_proj.weight": "embeddings.patch_embeddings.projection.weight",
    "conv_proj.bias": "embeddings.patch_embeddings.projection.bias",
    "encoder.pos_embedding": "embeddings.position_embeddings",
    "encoder.ln.weight": "layernorm.weight",
    "encoder.ln.bias": "layernorm.bias",
}
_HUGGINGFACE_VIT_BLOCK = {
    "ln_1": ["layernorm_before"],
    # One tensor of torchvision's is theirs three, one below the other.
    "self_attention.in_proj": [f"attention.attention.{x}" for x in ("query", "key", "value")],
    "self_attention.out_proj": ["attention.output.dense"],
    "ln_2": ["layernorm_after"],
    "mlp.0": ["intermediate.dense"],
    "mlp.3": ["output.dense"],
}


def huggingface_vit(name: str) -> list[str]:
    """transformers' names, in files, of the equal parts along dim 0 of a tensor of torchvision's
    ViT.

    Raises:
        KeyError: there is no such tensor.
    """
    if not name.startswith(_BLOCK):
        return [_HUGGINGFACE_VIT[name]]
    index, layer, kind = _in_block(name)
    return [f"encoder.layer.{index}.{part}.{kind}" for part in _HUGGINGFACE_VIT_BLOCK[layer]]


def _in_block(name: str) -> tuple[str, str, str]:
    """Number of the block, layer in it, weight or bias."""
    index, _, rest = name.removeprefix(_BLOCK).partition(".")
    # in_proj_weight, but out_proj.weight
    layer, _, kind = rest.replace("in_proj_", "in_proj.").rpartition(".")
    return index, layer, kind
