# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Spend a cache's memory: more tokens, or more precision?
#
# A KV cache of a sixteenth of its size can hold few tokens exactly or many coarsely, and each head may choose for itself. This
# notebook finds the allocation that keeps most of what the embedded model's cache says about the next tokens, looks at it, and
# generates from a cache that is compressed to it. About a minute on two cores.

# %%
# %matplotlib inline
from random import Random

import ib_analysis as ib
from ib_analysis.cache.generation import generate_text
from ib_analysis.tasks.mixture import mixture
from ib_analysis.tasks.retrieval import retrieval

model, tokenizer = ib.load()  # or a folder, or a name on the hub; optimal_allocation also takes any PreTrainedModel

# %% [markdown]
# Twelve prompts of 512 tokens are few (by default it takes 96 and more time), but enough to see how it works. A third of them
# is not calibrated on: it decides between the allocation and the best cell of every policy.

# %%
allocation = ib.optimal_allocation(model, 1 / 16, prompts=mixture("notebook", 12, 512), tokenizer=tokenizer)
print(allocation)

# %% [markdown]
# What each head keeps: a row is a tier of a head, with its share of the tokens and its bits. All other tokens are evicted.

# %%
allocation.table()

# %%
allocation.plot()

# %% [markdown]
# The loss is measured in bits per predicted token, here on prompts that nothing was chosen by. It is the KL divergence of the
# next token's distribution with the compressed cache from that with the full one: what the compressed cache no longer says
# about it.

# %%
held_out = allocation.validate(model, mixture("held out", 8, 512), tokenizer=tokenizer)
print(held_out.validation)

# %% [markdown]
# The cache is a transformers `Cache`: `model.generate(**inputs, **ib.cache_argument(model, cache))` fills it, compresses it and
# reads from it. `generate_text` below does so for a text. The model has to find a key among many.

# %%
prompt = retrieval(Random(1), 512)
text = prompt.context + prompt.question
print("...", text[-120:])
print("asked for:      ", prompt.answer)
print("full cache:     ", generate_text(model, tokenizer, text, 2))
cache = allocation.cache(model)
print("compressed:     ", generate_text(model, tokenizer, text, 2, cache))
tokens = cache.get_seq_length()
full_bytes = tokens * allocation.spec.shape.bytes_per_token
print(f"{cache.nbytes:,} of {full_bytes:,} bytes, {cache.nbytes / full_bytes:.3f} of the cache")
