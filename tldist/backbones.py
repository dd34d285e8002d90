"""The former place of `tldist.models.backbones`, kept for scripts that import `build` from here."""

from tldist.models.backbones import build

__all__ = ["build"]
