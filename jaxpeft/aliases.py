"""What papers and other libraries call a method, and here is an option of one, a chain, or another part of a run."""

# name, in small letters and digits alone -> the flags of `jaxpeft train`.
FLAGS = {
    "bone": "--method miss",
    "eva": "--method lora --method-options init=eva",
    "hft": "--method half",
    "loftq": "--method lora+quantize --method-options init=loftq",
    "loraga": "--method lora --method-options init=lora_ga",
    "loraplus": "--method lora --method-options lr_ratio=16",
    "olora": "--method lora --method-options init=olora",
    "pissa": "--method lora --method-options init=pissa",
    "prefixtuning": "--method prefix",
    "prompttuning": "--method prompt",
    "qdora": "--method quantize+dora",
    "qlora": "--method quantize+lora",
    "rslora": "--method lora --method-options rslora=true",
    "star": "--rounds 10 --method-options dropout=0.1",
}


def flags_of(name: str) -> str | None:
    """The flags for what is called so elsewhere, however it is spelt; None where nothing here is known to be it.

    >>> flags_of("LoRA-GA")
    '--method lora --method-options init=lora_ga'
    """
    return FLAGS.get("".join(filter(str.isalnum, name)).lower())
