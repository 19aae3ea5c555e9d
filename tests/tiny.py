"""The config of a run that takes a moment."""

from lmnfast.grokking.config import Config

TINY = Config("modular-addition", p=5, steps=20, every=5, threads=1, device="cpu")
