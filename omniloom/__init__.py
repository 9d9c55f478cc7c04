"""omniloom fine-tunes omni-modal language models on text, images, audio and video."""

__version__ = "0.1.0"
