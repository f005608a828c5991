"""One file per method, found by its name: `jaxpeft/methods/<name>.py` has the public factory `<name>`.

Besides the factory a file has SUMMARY, KIND, SAVES, REFERENCE (shown by `jaxpeft methods`), EXAMPLE (arguments for
the conformance test), STARTS_AT_BASE (whether the adapted model equals the base at initialisation), `saved_bytes`
(what it keeps for the backward pass) and, where Hugging Face PEFT knows the method, PEFT_SCOPE and the functions that
translate its leaves and its configuration.
"""
