# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # How much information does a compressed cache hold?
#
# Three questions, with different answers: how many bits are stored, how many bits the codes hold about the cache that they stand
# for, and how many of these the model uses for its next tokens. About a minute on two cores.

# %%
# %matplotlib inline
import ib_analysis as ib
from ib_analysis.tasks.mixture import mixture

model, tokenizer = ib.load()
prompts = mixture("notebook", 12, 512)

# %% [markdown]
# ## The information plane
#
# One calibration serves all budgets. Points are measured on prompts that are held out, a quarter: `retained_bits` of the bits
# that the full cache says about a predicted token, against what it takes to store.

# %%
plane = ib.information_plane(model, prompts=prompts, tokenizer=tokenizer, shares=(1 / 4, 1 / 8, 1 / 16))
best = plane.points[plane.points["best"]]
best[["family", "setting", "budget_share", "stored_bits", "retained_bits", "low_bits", "high_bits"]].round(3)

# %%
plane.plot()

# %% [markdown]
# ## More tokens, or more precision?
#
# The uniform cells of one budget: a share of the tokens, all at one precision. At a sixteenth of the memory neither end is best.

# %%
cells = plane.points[(plane.points["budget_share"] == 1 / 16) & plane.points["family"].isin(["quantized pruning", "prune-only"])]
cells.sort_values("retained_bits", ascending=False)[["setting", "stored_bits", "retained_bits"]].head(10).round(3)

# %% [markdown]
# ## Head by head
#
# `dithered_bits` and `gaussian_bits` estimate the information between the full and the compressed keys and values, in bits per
# context token; `usable_bits` is what the model loses without the head, in bits per predicted token. A head can hold much of
# itself and be of no use, and the other way round.

# %%
table = ib.information(model, plane.allocations[-1], prompts[:6], tokenizer=tokenizer)
table.round(3)
