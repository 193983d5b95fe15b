"""Export to the Hugging Face layout: config, safetensors, tokenizer files, model card."""
