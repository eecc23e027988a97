"""What a selection is worth: a small VLM fine-tuned on all of a pool and on 16 % of it.

`python -m benchmarks.quality --preset tiny|cpu|gpu` makes a small LLaVA, trains it on captions and terse
questions about generated scenes until it can answer, and takes it as the target model. The product's own
code represents the rows of a pool with it, scores and chooses them. The same base model is then fine-tuned
on the whole pool and on every choice, and is asked held-out questions of every skill.

`scenes` and `questions` draw the generated world, `pools` makes pools and their tests, `target` the model,
`fine_tuning` trains and asks it, `choosing` calls the product, `trial` runs one seed of one pool, and
`tables` prints paired differences from random with their intervals. What was run with it stands in
docs/evidence.md.
"""
