"""Bundled flows, one directory each: config.json, model.safetensors and their card."""

SHA256 = {
    "glow-cifar10": "77051f916759e104c1bedd13d7cf8b2b0940cfd7b603253e0a2716be33a2d8e0",
    "glow-cifar10-small": "d5d23974fb58d254b8d235a731e9b40fbcea2ac4fcbc50b03f733975bc164c18",
    "glow-fashionmnist": "1a375975f504d1192ed5c470a8a41926438c76c9cf888ce67a26d379111aae80",
    "glow-photographs": "7f323a848a6b9745ab227142602306710d942d3e342f72285b5ae42ca5ae7ba5",
}
"""Of each flow's weights, as `load_flow` expects them."""
