"""Data sets, text, corruptions, pools of samples and streams of shifts."""
