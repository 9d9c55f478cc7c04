"""Qwen3.5's media as tokens: those of Qwen3-VL, under templates of its own."""

from __future__ import annotations

from omniloom.families.qwen3_vl.processor import Qwen3VLClips


class Qwen3_5Clips(Qwen3VLClips):
    templates = ("qwen3_5", "qwen3_5_nothink")
