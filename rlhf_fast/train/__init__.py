"""Supervised fine-tuning, reward model, PPO, GRPO, RLOO and DPO for Hugging Face causal language models.

Each stage reads a directory and writes a directory in Hugging Face format; nothing else travels between them.
"""
