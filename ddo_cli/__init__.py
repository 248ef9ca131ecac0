"""Direct Discriminative Optimization and discriminator guidance for likelihood-based image models."""

__version__ = "0.1.0"
