"""An adapter that fleet wrote, as its users take it: PEFT loads it, and transformers the model that fleet makes of both."""

import adapters
from peft import get_peft_model_state_dict
from program import apart, heard, logits_of, model_in
from safetensors.torch import load_file


def taken(fleet, base, adapter, ids):
    """The model with the adapter, how far fleet's logits and those of the merged model are from it, and what was said."""
    with heard() as said:
        model = adapters.loaded(base, adapter)
    # Of what has no place PEFT says nothing.
    in_file, wanted = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    said += [f"{key} has no place" for key in sorted(in_file.keys() - adapters.parameters(model).keys())]
    # PEFT writes an embedding that is changed, and the head, as they were, too.
    said += [f"{key} is missing" for key in sorted(wanted.keys() - in_file.keys()) if not key.endswith("base_layer.weight")]
    logits = logits_of(model, ids)
    merged = fleet.out / f"merged-{adapter.parent.name}-{adapter.name}"
    fleet("adapter", "merge", "--model", base, "--adapter", adapter, "--output", merged)
    as_one, more = model_in(merged)
    far = {"own logits": apart(fleet.logits(base, ids, adapter), logits), "merged": apart(logits_of(as_one, ids), logits)}
    return logits, far, said + more
