"""Bundled flows, one directory each: config.json, model.safetensors and their card."""
