"""Transfer learning on images: frozen prefixes that cost what they must, unfreezing that is right."""

__version__ = "0.1.0"
