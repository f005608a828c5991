"""PEFT's form of a method: `ABOUT.peft` in its file, by which `export` and `read` know it.

A form says which of PEFT's tensors hold the method's leaves, and turns the factory's arguments into adapter_config.json
and back. Five functions make one:

    lora_pairs   per site lora_A, lora_B and perhaps more (a magnitude): the LORA family
    lycoris      per site what ranks and scales of patterns choose: LOHA, LOKR
    vectors      per site one vector over the outputs or the inputs: IA3
    norms        per norm copies of its scale and bias: LN_TUNING
    per_model    a few tensors of the whole model: PREFIX_TUNING, PROMPT_TUNING

and `per_site` is what the first three are made of. Methods may share a peft_type: `when` tells them apart.

    PEFT = form.lora_pairs(
        "dora",                                                            # the scope: <site>/dora/<leaf>
        scale=lambda config, site: config["alpha"] / config["rank"],
        tensors={"magnitude": form.Tensor("lora_magnitude_vector", "m")},  # beside a and b
        fill={"magnitude": lambda kernel: np.linalg.norm(kernel, axis=0)},
        fields=lambda config: {"use_dora": True},
        when={"use_dora": True},
    )

Users' mistakes are `InputError`s without the file's name, which the callers put in front.
"""

from jaxpeft.peft.form.kinds import ALWAYS, Base, Form, Tensor, Written, base_of, form_of, method_for
from jaxpeft.peft.form.lora import lora_pairs
from jaxpeft.peft.form.lycoris import lycoris, rank_and_alpha
from jaxpeft.peft.form.norms import norms
from jaxpeft.peft.form.sites import Part, as_target_modules, commonest, per_site, sites_as_targets
from jaxpeft.peft.form.vectors import vectors
from jaxpeft.peft.form.whole import from_keys_values, per_model, to_keys_values

__all__ = [
    "ALWAYS",
    "Base",
    "Form",
    "Part",
    "Tensor",
    "Written",
    "as_target_modules",
    "base_of",
    "commonest",
    "form_of",
    "from_keys_values",
    "lora_pairs",
    "lycoris",
    "method_for",
    "norms",
    "per_model",
    "per_site",
    "rank_and_alpha",
    "sites_as_targets",
    "to_keys_values",
    "vectors",
]
