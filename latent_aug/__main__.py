"""`python -m latent_aug`, which accelerate and torchrun can launch."""

from latent_aug.cli import main

main()
