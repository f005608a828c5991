"""jaxpeft: the memory of fine-tuning, visible, predictable and controllable in JAX.

Names are imported at their first use, so that the command line can answer before JAX is loaded.
"""

from typing import TYPE_CHECKING

from jaxpeft.on_demand import imports

if TYPE_CHECKING:
    from jaxpeft.adapters import several
    from jaxpeft.backward.planned import planned_scan
    from jaxpeft.backward.policy import checkpoint_policy
    from jaxpeft.backward.residuals import remat
    from jaxpeft.errors import InputError, RunError
    from jaxpeft.hf import load_pretrained, save_pretrained
    from jaxpeft.linen import from_linen
    from jaxpeft.memory.functions import plan, profile
    from jaxpeft.method import Method, Objective, Spec, chain, setup
    from jaxpeft.methods.ba_lora import ba_lora
    from jaxpeft.methods.bitfit import bitfit
    from jaxpeft.methods.colm import colm
    from jaxpeft.methods.dept import dept
    from jaxpeft.methods.direft import direft
    from jaxpeft.methods.dora import dora
    from jaxpeft.methods.full import full
    from jaxpeft.methods.galore import galore
    from jaxpeft.methods.half import half
    from jaxpeft.methods.houlsby import houlsby
    from jaxpeft.methods.hybrid import hybrid
    from jaxpeft.methods.ia3 import ia3
    from jaxpeft.methods.int21 import int21
    from jaxpeft.methods.ist import ist
    from jaxpeft.methods.lamda import lamda
    from jaxpeft.methods.lemo import lemo
    from jaxpeft.methods.light_peft import light_peft
    from jaxpeft.methods.lisa import lisa
    from jaxpeft.methods.llm_qfa import llm_qfa
    from jaxpeft.methods.ln_tuning import ln_tuning
    from jaxpeft.methods.loha import loha
    from jaxpeft.methods.lokr import lokr
    from jaxpeft.methods.lora import lora
    from jaxpeft.methods.lora_fa import lora_fa
    from jaxpeft.methods.loraprune import loraprune
    from jaxpeft.methods.loreft import loreft
    from jaxpeft.methods.lq_lora import lq_lora
    from jaxpeft.methods.lst import lst
    from jaxpeft.methods.meft import meft
    from jaxpeft.methods.mezo import mezo
    from jaxpeft.methods.miss import miss
    from jaxpeft.methods.mixlora import mixlora
    from jaxpeft.methods.natural_galore import natural_galore
    from jaxpeft.methods.oft import oft
    from jaxpeft.methods.owlore import owlore
    from jaxpeft.methods.paca import paca
    from jaxpeft.methods.parallel import parallel
    from jaxpeft.methods.peqa import peqa
    from jaxpeft.methods.pfeiffer import pfeiffer
    from jaxpeft.methods.pockengine import pockengine
    from jaxpeft.methods.prefix import prefix
    from jaxpeft.methods.prompt import prompt
    from jaxpeft.methods.pst import pst
    from jaxpeft.methods.quantize import quantize
    from jaxpeft.methods.qzo import qzo
    from jaxpeft.methods.randlora import randlora
    from jaxpeft.methods.sara import sara
    from jaxpeft.methods.sherl import sherl
    from jaxpeft.methods.shira import shira
    from jaxpeft.methods.slimfit import slimfit
    from jaxpeft.methods.snell import snell
    from jaxpeft.methods.snella import snella
    from jaxpeft.methods.sparse_mezo import sparse_mezo
    from jaxpeft.methods.sparsegrad import sparsegrad
    from jaxpeft.methods.speft import speft
    from jaxpeft.methods.spiel import spiel
    from jaxpeft.methods.spt import spt
    from jaxpeft.methods.spt_lora import spt_lora
    from jaxpeft.methods.svfit import svfit
    from jaxpeft.methods.unipt import unipt
    from jaxpeft.methods.vblora import vblora
    from jaxpeft.methods.velora import velora
    from jaxpeft.methods.vera import vera
    from jaxpeft.methods.vqt import vqt
    from jaxpeft.methods.welore import welore
    from jaxpeft.methods.wta_crs import wta_crs
    from jaxpeft.methods.zo2 import zo2
    from jaxpeft.model import Context, Model, Stack
    from jaxpeft.nnx import carry, from_nnx, to_nnx
    from jaxpeft.peft import attach, attach_several, export_adapter, import_adapter, weighted_adapter
    from jaxpeft.train.loss import classification_loss, completion_loss
    from jaxpeft.train.masked import masked, trainable_mask
    from jaxpeft.train.run import Run, run
    from jaxpeft.train.state import TrainState, init_state
    from jaxpeft.train.step import jit_step, make_train_step
    from jaxpeft.tree import combine, split
    from jaxpeft.unused_rows import prune_embeddings

_MODULE_OF = {
    "Context": "model",
    "InputError": "errors",
    "Method": "method",
    "Model": "model",
    "Objective": "method",
    "Run": "train.run",
    "RunError": "errors",
    "Spec": "method",
    "Stack": "model",
    "TrainState": "train.state",
    "attach": "peft",
    "attach_several": "peft",
    "ba_lora": "methods.ba_lora",
    "bitfit": "methods.bitfit",
    "carry": "nnx",
    "chain": "method",
    "checkpoint_policy": "backward.policy",
    "classification_loss": "train.loss",
    "combine": "tree",
    "completion_loss": "train.loss",
    "colm": "methods.colm",
    "dept": "methods.dept",
    "direft": "methods.direft",
    "dora": "methods.dora",
    "export_adapter": "peft",
    "from_linen": "linen",
    "from_nnx": "nnx",
    "full": "methods.full",
    "ia3": "methods.ia3",
    "galore": "methods.galore",
    "half": "methods.half",
    "houlsby": "methods.houlsby",
    "hybrid": "methods.hybrid",
    "import_adapter": "peft",
    "init_state": "train.state",
    "int21": "methods.int21",
    "lamda": "methods.lamda",
    "ist": "methods.ist",
    "lemo": "methods.lemo",
    "light_peft": "methods.light_peft",
    "lisa": "methods.lisa",
    "llm_qfa": "methods.llm_qfa",
    "ln_tuning": "methods.ln_tuning",
    "load_pretrained": "hf",
    "loha": "methods.loha",
    "lokr": "methods.lokr",
    "lora": "methods.lora",
    "lora_fa": "methods.lora_fa",
    "loraprune": "methods.loraprune",
    "loreft": "methods.loreft",
    "lq_lora": "methods.lq_lora",
    "lst": "methods.lst",
    "jit_step": "train.step",
    "make_train_step": "train.step",
    "masked": "train.masked",
    "meft": "methods.meft",
    "miss": "methods.miss",
    "mixlora": "methods.mixlora",
    "natural_galore": "methods.natural_galore",
    "oft": "methods.oft",
    "owlore": "methods.owlore",
    "paca": "methods.paca",
    "quantize": "methods.quantize",
    "mezo": "methods.mezo",
    "remat": "backward.residuals",
    "run": "train.run",
    "parallel": "methods.parallel",
    "peqa": "methods.peqa",
    "pfeiffer": "methods.pfeiffer",
    "plan": "memory.functions",
    "pockengine": "methods.pockengine",
    "prefix": "methods.prefix",
    "prompt": "methods.prompt",
    "planned_scan": "backward.planned",
    "profile": "memory.functions",
    "save_pretrained": "hf",
    "setup": "method",
    "prune_embeddings": "unused_rows",
    "pst": "methods.pst",
    "qzo": "methods.qzo",
    "randlora": "methods.randlora",
    "several": "adapters",
    "sara": "methods.sara",
    "sherl": "methods.sherl",
    "split": "tree",
    "to_nnx": "nnx",
    "trainable_mask": "train.masked",
    "shira": "methods.shira",
    "slimfit": "methods.slimfit",
    "snell": "methods.snell",
    "snella": "methods.snella",
    "sparsegrad": "methods.sparsegrad",
    "speft": "methods.speft",
    "spiel": "methods.spiel",
    "spt": "methods.spt",
    "spt_lora": "methods.spt_lora",
    "sparse_mezo": "methods.sparse_mezo",
    "svfit": "methods.svfit",
    "unipt": "methods.unipt",
    "vblora": "methods.vblora",
    "velora": "methods.velora",
    "vera": "methods.vera",
    "vqt": "methods.vqt",
    "welore": "methods.welore",
    "wta_crs": "methods.wta_crs",
    "zo2": "methods.zo2",
    "weighted_adapter": "peft",
}
__all__ = [*_MODULE_OF]

__getattr__, __dir__ = imports(__name__, _MODULE_OF)
