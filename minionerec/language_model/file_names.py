"""Names of the files of models and checkpoints, importable without torch."""

PROMPT_FILE = "prompt.yaml"  # the wording of the prompts
SETTINGS_FILE = "minionerec.json"  # `checkpoints.Settings`
MODEL_FILES = (  # what a folder with a model and a tokenizer consists of, as glob patterns
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
CHECKPOINT_FILES = (*MODEL_FILES, PROMPT_FILE, SETTINGS_FILE, "checkpoint-*")  # what a training stage writes
