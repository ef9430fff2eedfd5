"""Bundled flows, one directory each: config.json, model.safetensors and their card."""

SHA256 = {
    "glow-cifar10": "1e332f67e0aff29d00582b4677c68b5c478d0b74a962c22c8db26cc99f5a4423",
    "glow-fashionmnist": "1a375975f504d1192ed5c470a8a41926438c76c9cf888ce67a26d379111aae80",
}
"""Of each flow's weights, as `load_flow` expects them."""
