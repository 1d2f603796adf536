"""Names of the same tensors in other libraries, where they differ from torchvision's."""

# torchvision's, timm's and transformers' names of a ViT's tensors, and of the layers of a block.
_VIT = {
    "class_token": ("cls_token", "embeddings.cls_token"),
    "conv_proj.weight": (
        "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.weight",
    ),
    "conv_proj.bias": ("patch_embed.proj.bias", "embeddings.patch_embeddings.projection.bias"),
    "encoder.pos_embedding": ("pos_embed", "embeddings.position_embeddings"),
    "encoder.ln.weight": ("norm.weight", "layernorm.weight"),
    "encoder.ln.bias": ("norm.bias", "layernorm.bias"),
}
_VIT_BLOCK = {
    "ln_1": ("norm1", "layernorm_before"),
    "self_attention.in_proj": ("attn.qkv", "attention.attention.{}"),
    "self_attention.out_proj": ("attn.proj", "attention.output.dense"),
    "ln_2": ("norm2", "layernorm_after"),
    "mlp.0": ("mlp.fc1", "intermediate.dense"),
    "mlp.3": ("mlp.fc2", "output.dense"),
}
_BLOCK = "encoder.layers.encoder_layer_"


def timm_vit(name: str) -> str:
    """timm's name of a tensor of torchvision's VisionTransformer; MoCo v3's ViTs have them too.

    Raises:
        KeyError: there is no such tensor.
    """
    return _vit(name, 0, "blocks")


def huggingface_vit(name: str) -> list[str]:
    """transformers' names, in files, of the equal parts along dim 0 of a tensor of torchvision's
    ViT: its projection to queries, keys and values is theirs three.

    Raises:
        KeyError: there is no such tensor.
    """
    theirs = _vit(name, 1, "encoder.layer")
    parts = ("query", "key", "value") if "{}" in theirs else ("",)
    return [theirs.format(part) for part in parts]


def _vit(name: str, library: int, blocks: str) -> str:
    if not name.startswith(_BLOCK):
        return _VIT[name][library]
    index, _, rest = name.removeprefix(_BLOCK).partition(".")
    # in_proj_weight, but out_proj.weight
    layer, _, kind = rest.replace("in_proj_", "in_proj.").rpartition(".")
    return f"{blocks}.{index}.{_VIT_BLOCK[layer][library]}.{kind}"


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
