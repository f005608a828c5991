"""One file per method, found by its name: `jaxpeft/methods/<name>.py` has the public factory `<name>`.

Besides the factory a file has

    SUMMARY, KIND, SAVES, REFERENCE     what `jaxpeft methods` shows
    EXAMPLE                             arguments for the conformance test
    STARTS_AT_BASE                      whether the adapted model equals the base at initialisation
    saved_bytes(inputs, outputs, ...)   bytes per token and kernel that it keeps for the backward pass, or
    layer_bytes(config, itemsize, ...)  bytes per token that it keeps for one more layer, where it runs them in its way
    MERGES = False                      where it has no merged form
    CLASSIFIES = True                   where it is for encoders that classify rows alone
    changes_kernels(config)             whether the kernels beside its adapters are not the base's own

and, where Hugging Face PEFT knows the method,

    PEFT                                its form: tensors and adapter_config.json, both ways (see `jaxpeft.peft.form`)
"""
