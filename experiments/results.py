"""One result record per cell (model x dataset x pruner x budget), written so that a kill loses nothing.

    results/<model>/<dataset>/<pruner>/keep=<keep>[,<what differs>]-<id>/
        config.yaml     the resolved config
        samples.jsonl   one line a sample, appended as it is answered
        record.json     the record below; its presence means that the cell is finished
        masks.png       what was kept, for a few samples

The id is a hash of everything in the resolved config that can change a number, so two cells never mix.

record.json
-----------
schema            int, 1
id                str, the cell's id
cell              {model, dataset, pruner, keep, seed}: the words of the command line
config            the resolved config
command           str, the command that made it
git_commit        str, with "+" appended when the tree had changes
versions          {python, torch, transformers, ...}
device            str
started, finished str, ISO 8601
n_samples         int, the denominator of every metric
failed            [{id, error}], samples that could not be run; they count as wrong
metrics           {name: number}, accuracies in percent, the headline first
standard_errors   {name: number}, of those metrics that are a mean over samples
tokens            {visual, kept, per_layer, layer_mean}: means over samples: visual tokens before pruning, the nominal
                  budget, visual tokens entering each LLM layer, and the mean of that over layers
latency_ms        {vision, scoring, prefill, decode, total}: mean per sample, as measured in the run's batches
batch_size        int
peak_memory_gib   float: of the GPU, or of the process on a CPU

samples.jsonl
-------------
id, image_id, task, question, answer, prediction, correct (0..1), n_visual, n_kept, kept (indices per picture),
error (only if failed)
"""
