"""One file per method, found by its name: `jaxpeft/methods/<name>.py` has the public factory `<name>`.

Besides the factory a file has

    SUMMARY, KIND, SAVES, REFERENCE     what `jaxpeft methods` shows
    EXAMPLE                             arguments for the conformance test
    STARTS_AT_BASE                      whether the adapted model equals the base at initialisation
    saved_bytes(inputs, outputs, ...)   bytes per token and kernel that it keeps for the backward pass, or
    layer_bytes(config, itemsize, ...)  bytes per token that it keeps for one more layer, where it runs them in its way
    MERGES = False                      where it has no merged form
    TWICE = True                        where a chain may hold it twice, as it has no leaves of its own
    CLASSIFIES = True                   where it is for encoders that classify rows alone

and, where Hugging Face PEFT knows the method,

    PEFT_SCOPE                          the scope of its leaves at a site
    PEFT_EXTRA                          leaves that the factors don't hold (seeds), kept in jaxpeft.json
    peft_factors, peft_leaves           its leaves as A (..., n, r), B (..., r, m) for the original base, and back
    peft_config, peft_scale             fields of adapter_config.json; the factor of A B at a site
    changes_kernels                     whether its kernels are not the base's own
"""
