"""Names of files in a checkpoint."""

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
ADAPTER = "adapter_config.json"
