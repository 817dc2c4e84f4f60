"""Fine-tuning and evaluation on GSM8K and on the built-in problems. Nothing heavy is imported until it is needed."""
