"""A wrong setting is one sentence that names it, before anything is loaded or written."""

import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from topkbench.harness import main as command
from topkbench.harness.runner import Runner
from topkbench.harness.settings import GROUPS, Composed, Names, SettingsError, check
from topkbench.models import load
from topkbench.tasks import lm_eval

CONF = Path(__file__).parents[2] / "conf"
SUBTASKS = "niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, fwe"

# The line, and how its sentence begins.
BAD = {
    # Settings of the whole run, whichever part of it uses them.
    "k=sixty": "k must be a whole number, got 'sixty'.",
    "k=0": "k must be at least 1, got 0.",
    "k=-5": "k must be at least 1, got -5.",
    "k=64.0": "k must be a whole number, got 64.0.",
    "k=true": "k must be a whole number, got true.",
    "k=[64]": "k must be a whole number, got [64].",
    "k=null": "k must be a whole number, got null.",
    "k=11": "protocol.num_sink + num_recent must be at most k=11, got 4 + 8",
    "k=99999999999999999999": "k must be a whole number, got 99999999999999999999; rows hold",
    "rbit=100": "rbit must be a positive multiple of 32, got 100.",
    "rbit=0 method=quest": "rbit must be a positive multiple of 32, got 0.",
    "rbit='64'": "rbit must be a whole number, got '64'.",
    "seed=[1,2]": "seed must be a whole number, got [1, 2].",
    "seed=-1": "seed must be at least 0, got -1.",
    "seed=0.5": "seed must be a whole number, got 0.5.",
    "question=open": "question must be one of sparse, dense, got 'open'.",
    "question=true": "question must be one of sparse, dense, got true.",
    "num_samples=0": "num_samples must be at least 1, got 0.",
    "num_samples=two task=decode_latency": "num_samples must be a whole number, got 'two'.",
    "task=decode_latency num_samples=3": (
        "num_samples has no effect with task=decode_latency, which has no such setting; leave it"
        " out."
    ),
    "task=decode_latency k=64": (
        "k has no effect with task=decode_latency and these settings; task.budget=null uses it."
    ),
    "task=selection k=64": (
        "k has no effect with task=selection and these settings; task.budgets=[64] sets the task's"
        " own."
    ),
    "task=fit num_samples=3": "num_samples has no effect with task=fit, which has no such setting;",
    "task=decode_latency question=dense": "question has no effect with task=decode_latency, which",
    "task=decode_throughput question=dense": "question has no effect with task=decode_throughput,",
    "task=selection num_samples=5": (
        "num_samples has no effect with task=selection, which has a num_samples of its own; give"
        " task.num_samples instead."
    ),
    "device=nonsense": "device must be cpu, cuda or cuda:NUMBER, got 'nonsense'.",
    "device=meta": "device must be cpu, cuda or cuda:NUMBER, got 'meta'.",
    "device=cpu:1": "device must be cpu, cuda or cuda:NUMBER, got 'cpu:1'.",
    "device=0": "device must be text, got 0; quotes inside quotes make it text: 'device=\"0\"'.",
    "dtype=float64": "dtype must be one of auto, float32, bfloat16, float16, got 'float64'.",
    "dtype=[float32]": "dtype must be one of auto, float32, bfloat16, float16, got ['float32'].",
    "impl=triton": "impl=triton needs tensors on a cuda device, got cpu; use impl=auto.",
    "impl={topk_select:triton} method=exact": (
        "impl.topk_select=triton needs tensors on a cuda device, got cpu; use impl.topk_select=auto"
    ),
    "impl=gpu": "impl must be one of auto, reference, cpu, triton or a mapping, got 'gpu'.",
    "impl=[cpu]": "impl must be one of auto, reference, cpu, triton or a mapping, got ['cpu'].",
    "impl={hamming_scor:reference}": (
        "there is no setting impl.hamming_scor; did you mean impl.hamming_score."
    ),
    "impl={hamming_score:fast}": (
        "impl.hamming_score must be one of auto, reference, cpu, triton, got 'fast'."
    ),
    "force=1": "force must be true or false, got 1.",
    "force=yes_please": "force must be true or false, got 'yes_please'.",
    "full_backend=cuda": (
        "full_backend must be one of auto, sdpa, cpu, triton, flash_attn, flash_attn_3, flashinfer,"
        " got 'cuda'"
    ),
    "full_backend=flash_attn method=full": (
        "full_backend=flash_attn needs tensors on a cuda device, got cpu; use full_backend=sdpa."
    ),
    "method=full method.backend=triton": "method.backend=triton needs tensors on a cuda device, ",
    "experiment_name=cells": (
        "experiment_name must name a folder inside results_dir, and none of cells, parts, claims,"
        " batch_sizes, studies, got 'cells'."
    ),
    "experiment_name=parts": "experiment_name must name a folder inside results_dir, and none of",
    "experiment_name=a/../cells/b": "experiment_name must name a folder inside results_dir, and",
    "experiment_name=../..": "experiment_name must name a folder inside results_dir, and none of",
    "experiment_name=/tmp": "experiment_name must name a folder inside results_dir, and none of",
    "experiment_name=[a]": "experiment_name must be text, got ['a'].",
    "results_dir=7": "results_dir must be text, got 7; quotes inside quotes make it text",
    "cache_dir=null": "cache_dir must be text, got null.",
    "artifact_dir=true": "artifact_dir must be text, got true; quotes",
    "prefill_memory_gib=abc": "prefill_memory_gib must be a finite number, got 'abc'.",
    "prefill_memory_gib=-1": "prefill_memory_gib must be at least 0, got -1.",
    "prefill_memory_gib=nan": "prefill_memory_gib must be a finite number, got nan.",
    "calibration_memory_gib=0": "calibration_memory_gib must be above 0, got 0.",
    "calibration_memory_gib=inf": (
        "calibration_memory_gib must be a finite number or null, got inf."
    ),
    "+foo=1": "there is no setting foo, and none that refers to it.",
    "+num_sample=1": (
        "there is no setting num_sample, and none that refers to it; did you mean num_samples."
    ),
    "k=${foo}": "k must refer to a setting that there is, got '${foo}'.",
    "k=???": "k must be given.",
    # The model.
    "model.name=7": "model.name must be text, got 7; quotes inside quotes make it text",
    "model.name=": "model.name must not be empty.",
    "model=local model.path=/x": "model.name must be given.",
    "model.path=": "model.path must not be empty.",
    "model.path=[tiny]": "model.path must be text, got ['tiny'].",
    "model.path=/no/such/folder": "model.path must be a hub id, a folder or one of tiny, found no",
    "model=local model.name=a model.path=tiny model.gguf_file=7": (
        "model.gguf_file must be text or null, got 7; quotes inside quotes make it text"
    ),
    "model=local model.name=a model.path=package:no_such": (
        "model.path=package:no_such needs the package no_such, which is not installed; install it"
        " with pip install --no-deps no-such, or name a hub id or a folder:"
    ),
    "model=local model.name=a model.path=package:../x": (
        "model.path=package:../x needs the package ../x, which is not installed;"
    ),
    "model.path=random": "model.architecture must be given with model.path=random",
    "model=local model.name=a model.path=tiny model.device_map=nearest": (
        "model.device_map must be one of auto, balanced, balanced_low_0, sequential or null, got"
        " 'nearest'."
    ),
    "model=local model.name=a model.path=tiny model.chat=1": (
        "model.chat must be true or false, got 1."
    ),
    "model=local model.name=a model.path=tiny model.chat_template_kwargs=think": (
        "model.chat_template_kwargs must be a mapping or null, got 'think'."
    ),
    "model=local model.name=a model.path=tiny model.chat_template_kwargs=[enable_thinking]": (
        "model.chat_template_kwargs must be a mapping or null, got ['enable_thinking']."
    ),
    "model=local model.name=a model.path=tiny model.revision=7": (
        "model.revision must be text or null, got 7; quotes inside quotes make it text"
    ),
    "model=local model.name=a model.path=tiny model.config_overrides=yarn": (
        "model.config_overrides must be a mapping or null, got 'yarn'."
    ),
    "model=local model.name=a model.path=tiny model.config_overrides={rope:1}": (
        "model.config_overrides must name fields of the model's configuration, got 'rope', which"
    ),
    "model=local model.name=a model.path=tiny model.adapter=[a]": (
        "model.adapter must be text or null, got ['a']."
    ),
    "model=local model.name=a model.path=tiny model.adapter=": ("model.adapter must not be empty."),
    "model=local model.name=a model.path=tiny model.adapter_revision=v1": (
        "model.adapter_revision must be left out without model.adapter, got 'v1'."
    ),
    "model.short_answers=null": "model.short_answers must be true or false, got null.",
    "model.window=0": "model.window must be at least 1, got 0.",
    "model.window=4e3": "model.window must be a whole number or null, got 4000.0.",
    "model.window=2048": "task.length must be at most the window of 2048 tokens of tiny, got 4096",
    "model=random_1b model.architecture=llama task=decode_throughput": (
        "model.architecture must be a mapping or null, got 'llama'."
    ),
    "model=random_1b model.architecture.hidden_size=big task=decode_throughput": (
        "model.architecture must be the fields of a transformers configuration"
    ),
    "model=random_1b": "this task needs text, and random_1b has random weights and no tokenizer",
    "+model.tokenizer=mine": "there is no setting model.tokenizer.",
    # RULER.
    "task.name=5": "task.name must be text, got 5",
    "task.length=-1": "task.length must be at least 1, got -1.",
    "task.length=8": "task.length must be more than the 8 tokens kept for an answer, got 8.",
    "model.short_answers=false task.length=128": "task.length must be more than the 128 tokens",
    "task.length=16385": "task.length must be at most the window of 16384 tokens of tiny, got",
    "task.length=[4096]": "task.length must be a whole number or null, got [4096].",
    "task.num_samples=1.5": "task.num_samples must be a whole number, got 1.5.",
    "task.batch_size=lots": "task.batch_size must be a whole number or auto, got 'lots'.",
    "task.batch_size=2.0": "task.batch_size must be a whole number or auto, got 2.0.",
    "task.batch_size=0": "task.batch_size must be at least 1, got 0.",
    "task.timed_prompts=-1": "task.timed_prompts must be at least 0, got -1.",
    "task.judged_prompts=all": "task.judged_prompts must be a whole number, got 'all'.",
    "task.judged_tokens=0": "task.judged_tokens must be at least 1, got 0.",
    "task.kept_prompts=-1": "task.kept_prompts must be at least 0, got -1.",
    "task=perplexity task.windows=0": "task.windows must be at least 1, got 0.",
    "task=perplexity task.scored_tokens=-3": "task.scored_tokens must be at least 1, got -3.",
    "task=perplexity task.length=200": "task.length must leave a context before 256 scored tokens",
    "task=perplexity task.files=a.txt": "task.files must be a list of texts or null, got 'a.txt'",
    "task=perplexity task.files=[/no]": "task.files must be files, found none at '/no'.",
    "task=perplexity task.dataset=7": "task.dataset must be text or null, got 7; quotes",
    "task=perplexity task.dataset_files=7": "task.dataset_files must be text or null, got 7",
    "task=perplexity task.column=5": "task.column must be text, got 5; quotes",
    "task.subtasks=niah_single": (
        "task.subtasks must be a list of texts or null, got 'niah_single'; brackets make a list:"
        " 'task.subtasks=[niah_single]'."
    ),
    "task.subtasks=true": "task.subtasks must be a list of texts or null, got true.",
    "task.subtasks=[]": "task.subtasks must list at least one value, got [].",
    "task.subtasks=[vt,vt]": "task.subtasks must list each value once, got 'vt' twice.",
    "task.subtasks=[niah]": f"task.subtasks must be among {SUBTASKS}, got 'niah'.",
    "task.subtasks=[1]": "task.subtasks must be a list of texts or null, got [1].",
    "task=lm_eval": "task.names must name tasks or groups of lm-eval, such as task.names=gsm8k",
    "task=lm_eval task.names=7": "task.names must be",
    "task=lm_eval task.include_path=7": "task.include_path must be text or null, got 7; quotes",
    "task=lm_eval task.num_fewshot=two": "task.num_fewshot must be a whole number or null, got",
    "task=lm_eval task.metric=7": "task.metric must be text or null, got 7; quotes",
    "task=lm_eval task.truncate=left": "task.truncate must be",
    "task=lm_eval task.question_fields=a": "task.question_fields must be a list of texts, got 'a'",
    "task=lm_eval task.max_new_tokens=0": "task.max_new_tokens must be at least 1, got 0",
    "task=lm_eval task.min_length=a": "task.min_length must be a whole number or null, got 'a'",
    "task=lm_eval task.no_chat=a": "task.no_chat must be a list of texts, got 'a'",
    "task=lm_eval task.metadata=7": "task.metadata must be a mapping or null, got 7",
    "task=lm_eval task.revisions=7": "task.revisions must be a mapping or null, got 7",
    "task=lm_eval task.judged_answer=all": "task.judged_answer must be",
    "task=multi_turn task.num_turns=1": "task.num_turns must be at least 2, got 1.",
    "task=multi_turn task.wording=german": "task.wording must be",
    "task=multi_turn task.new_tokens=0": "task.new_tokens must be at least 1, got 0.",
    "task=multi_turn task.prefill_history=1": "task.prefill_history must be true or false, got 1.",
    "task=ruler task.source=/no/such/file": "task.source must be a file of JSON lines or Parquet",
    "task=ruler task.source=hub:a": "task.source must name a data set as hub:OWNER/NAME, hub:OWNER",
    "task=ruler task.source=7": "task.source must be text or null, got 7; quotes",
    "task=ruler task.skip_bad=1": "task.skip_bad must be true or false, got 1.",
    "task=ruler task.skip_bad=true": (
        "task.skip_bad is a setting of task.source, got True without one"
    ),
    "task=ruler task.question_tokens=3": (
        "task.question_tokens is a setting of task.source, got 3 without"
    ),
    "task=ruler task.question_tokens=-1": "task.question_tokens must be at least 0, got -1.",
    "task=ruler task.haystack=/no/such/file": "task.haystack must be a file that can be read as",
    "task=ruler task.haystack=7": "task.haystack must be text or null, got 7; quotes",
    "task=ruler task.squad=/no/such/file": "task.squad must be a file that can be read as UTF-8,",
    "task=ruler task.hotpotqa=/no/such/file": "task.hotpotqa must be a file that can be read as",
    "task=ruler task.english_words=/no/such": "task.english_words must be a file that can be read",
    "task=ruler task.subtasks=[niah]": "task.subtasks must be among niah_single_1, niah_single_2,",
    "task=ruler task.subtasks=[qa_1]": "qa_1 needs the questions of SQuAD 2.0: set task.squad to",
    "task.example=maybe": "task.example must be true or false or null, got 'maybe'.",
    "task.cache_dir=1": "task.cache_dir must be text, got 1; quotes",
    "+task.lenght=5": "there is no setting task.lenght; did you mean task.length.",
    # The other tasks.
    "task=needle task.lengths=[]": "task.lengths must list at least one value, got [].",
    "task=needle task.lengths=[4096,1]": "task.lengths must be more than the 8 tokens kept for an",
    "task=needle task.lengths=[1024,1024]": "task.lengths must list each value once, got 1024",
    "task=needle task.lengths=1024": "task.lengths must be a list of whole numbers, got 1024;",
    "task=needle task.lengths=[20000]": "task.lengths must be at most the window of 16384 tokens",
    "task=needle task.depths=[0,101]": "task.depths must be at most 100 percent, got 101.",
    "task=needle task.depths=[-1]": "task.depths must be at least 0, got -1.",
    "task=needle task.depths=[0.5]": "task.depths must be a list of whole numbers, got [0.5].",
    "task=selection task.budgets=[]": "task.budgets must list at least one value, got [].",
    "task=selection task.budgets=[64,0]": "task.budgets must be at least 1, got 0.",
    "task=selection task.budgets=[8]": "protocol.num_sink + num_recent must be at most k=8, got 4",
    "task=selection task.budgets=64": "task.budgets must be a list of whole numbers, got 64;",
    "task=selection task.judged_tokens=0": "task.judged_tokens must be at least 1, got 0.",
    "task=selection_text task.budgets=[]": "task.budgets must list at least one value, got [].",
    "task=selection_text task.judged_tokens=0": "task.judged_tokens must be at least 1, got 0.",
    "task=selection_text task.windows=0": "task.windows must be at least 1, got 0.",
    "task=selection_text task.scored_tokens=0": "task.scored_tokens must be at least 1, got 0.",
    "task=selection_text task.length=50": "task.length must leave a context before 64 scored",
    "task=selection_text task.files=[/no]": "task.files must be files, found none at '/no'.",
    "task=selection_text task.dataset=7": "task.dataset must be text or null, got 7; quotes",
    "task=selection_text task.dataset_files=7": "task.dataset_files must be text or null, got 7",
    "task=selection_text task.column=5": "task.column must be text, got 5; quotes",
    "task=decode_latency task.lengths=[1]": "task.lengths must be at least 2, got 1.",
    "task=decode_latency task.lengths=[true]": "task.lengths must be a list of whole numbers, got",
    "task=decode_latency task.lengths=[]": "task.lengths must list at least one value, got [].",
    "task=decode_latency task.batch_sizes=[0]": "task.batch_sizes must be at least 1, got 0.",
    "task=decode_latency task.batch_sizes=4": "task.batch_sizes must be a list of whole numbers,",
    "task=decode_latency task.batch_sizes=[2,2]": "task.batch_sizes must list each value once,",
    "task=decode_latency task.batch_length=1": "task.batch_length must be at least 2, got 1.",
    "task=decode_latency task.budget=2": "task.budget must be a share above 0 and up to 1, got 2.",
    "task=decode_latency task.budget=none": "task.budget must be a finite number or null, got",
    "task=decode_latency task.states=real": "task.states must be one of planted, captured, got",
    "task=decode_latency task.layer=-1": "task.layer must be at least 0, got -1.",
    "task=decode_latency task.states=captured task.layer=4": "task.layer must lie between 0 and 3",
    "task=decode_latency task.num_heads=0": "task.num_heads must be at least 1, got 0.",
    "task=decode_latency task.num_kv_heads=5": "task.num_heads must be a multiple of",
    "task=decode_latency task.head_dim=1e2": "task.head_dim must be a whole number, got 100.0.",
    "task=decode_latency task.dtype=int8": "task.dtype must be one of auto, float32, bfloat16, flo",
    "task=decode_latency task.trials=0": "task.trials must be at least 1, got 0.",
    "task=decode_throughput task.budget=0": "task.budget must be a share above 0 and up to 1, got",
    "task=decode_throughput task.lengths=[64,64]": "task.lengths must list each value once, got 64",
    "task=decode_throughput task.batch_size=[1]": "task.batch_size must be a whole number, got",
    "task=decode_throughput task.trials=few": "task.trials must be a whole number, got 'few'.",
    "task=decode_throughput task.cuda_graph=2": "task.cuda_graph must be true or false, got 2.",
    # The card that a plan is for.
    "card=l4 card.name=7": "card.name must be text, got 7; quotes",
    "card=l4 card.name=''": "card.name must not be empty.",
    "card=l4 card.bf16_tflops=0": "card.bf16_tflops must be above 0, got 0",
    "card=l4 card.bandwidth_gb_s=fast": "card.bandwidth_gb_s must be a finite number, got 'fast'.",
    "card=l4 card.memory_gb=-1": "card.memory_gb must be above 0, got -1",
    "+card.price=1": "there is no setting card.price",
    # The policy.
    "protocol.protocol=mine": "protocol.protocol must be one of unified, native, got 'mine'.",
    "protocol.num_sink=4.5": "protocol.num_sink must be a whole number, got 4.5.",
    "protocol.num_sink=-1": "protocol.num_sink must be at least 0, got -1.",
    "protocol.num_recent=true": "protocol.num_recent must be a whole number, got true.",
    'protocol.dense_layers="100:"': (
        "protocol.dense_layers must reach a layer, and '100:' reaches none of 4; 0 leaves no"
    ),
    "protocol.dense_layers=[0.9]": (
        "protocol.dense_layers must be a whole number or a list of whole numbers or a slice such as"
        " '::16' or null, got [0.9]."
    ),
    "protocol.dense_layers=first": "protocol.dense_layers must be a number, a list, or a slice",
    "protocol.dense_layers=[0,0]": "protocol.dense_layers must list each value once, got 0 twice.",
    "protocol.dense_layers=[]": (
        "protocol.dense_layers must list at least one layer, got []; 0 is for none."
    ),
    "protocol.dense_layers=[4]": "protocol.dense_layers must lie between 0 and 3, got 4.",
    "protocol.dense_layers=-1": "protocol.dense_layers must be at least 0, got -1.",
    "protocol.head_scope=head": "protocol.head_scope must be one of kv_head, query_head, got",
    "protocol.aggregation=[native]": "protocol.aggregation must be one of native, sum_softmax, sum",
    "protocol.k=none": "protocol.k must be a whole number, got 'none'.",
    # What every method has.
    "method.label=7": "method.label must be text or null, got 7; quotes",
    "report.methods=hata": "report.methods must be a list of texts or null, got 'hata'",
    "method.words=compact": "method.words must be a mapping or null, got 'compact'.",
    "method.colour=red": "method.colour must be quoted as in '#D55E00', got 'red'.",
    "method.native.num_sink=-1": "method.native.num_sink must be at least 0, got -1.",
    "method.native.num_recent=few": "method.native.num_recent must be a whole number, got 'few'.",
    'method.native.dense_layers="9:"': "method.native.dense_layers must reach a layer, and '9:'",
    "method.native.head_scope=all": "method.native.head_scope must be one of kv_head, query_head",
    "method.native.aggregation=1": "method.native.aggregation must be one of native, sum_softmax",
    "+method.native.num_snk=1": "there is no setting method.native.num_snk; did you mean",
    "method.native=none": "method.native must be a mapping, got 'none'.",
    "protocol=native method=hata k=4 method.native.num_sink=5": (
        "method.native.num_sink + num_recent must be at most k=4, got 5 + 0"
    ),
    "method._target_=nowhere.Nothing": "method._target_ must name a class or function that can be",
    "+method.foo=1": "there is no setting method.foo",
    # HATA and the other methods that hash.
    "method.weights=learned": "method.weights must be one of trained, random, orthonormal, got",
    "method.recipe=ours": "method.recipe must be one of published, ranking, got 'ours'.",
    "method.use_norm=0": "method.use_norm must be true or false, got 0.",
    "method.centre_keys=mean": "method.centre_keys must be true or false, got 'mean'.",
    "method.query_codes=2": "method.query_codes must be 1 unless codes are trained by ranking,",
    "method.seed=-1": "method.seed must be at least 0, got -1.",
    "method.sigma=0": "method.sigma must be above 0, got 0.",
    "method.epsilon=-0.1": "method.epsilon must be at least 0, got -0.1.",
    "method.balance_weight=heavy": "method.balance_weight must be a finite number, got 'heavy'.",
    "method.decorrelation_weight=-1": "method.decorrelation_weight must be at least 0, got -1.",
    "method.balance_queries=[true]": "method.balance_queries must be true or false, got [True].",
    "method.fit_rbit=256": "method.fit_rbit must be null unless codes are trained by ranking, got",
    "method.optimiser=adamw": "method.optimiser must be one of sgd, adam, got 'adamw'.",
    "method.late_share=1.5": "method.late_share must be a share from 0 to 1, got 1.5.",
    "method.learning_rate=-1": "method.learning_rate must be above 0, got -1.",
    "method.momentum=1": "method.momentum must be from 0 to below 1, got 1.",
    "method.weight_decay=-1": "method.weight_decay must be at least 0, got -1.",
    "method.epochs=0": "method.epochs must be at least 1, got 0.",
    "method.steps_per_epoch=2.5": "method.steps_per_epoch must be a whole number, got 2.5.",
    "method.chunks_per_epoch=-3": "method.chunks_per_epoch must be at least 1, got -3.",
    "method.chunk_size=0": "method.chunk_size must be at least 1, got 0.",
    "method.positive_ratio=0": "method.positive_ratio must be a share above 0 and up to 1, got 0.",
    "method.positive_label=0": "method.positive_label must be above 0, got 0.",
    "method.queries_per_sequence=0": "method.queries_per_sequence must be at least 1, got 0.",
    "method.ranking_steps=0": "method.ranking_steps must be at least 1, got 0.",
    "method.ranking_learning_rate=0": "method.ranking_learning_rate must be above 0, got 0.",
    "method.ranking_pool=0": "method.ranking_pool must be at least 1, got 0.",
    "method.ranking_queries=0": "method.ranking_queries must be at least 1, got 0.",
    "method.ranking_keys=64": "method.ranking_keys must be at least 128, got 64.",
    "method.ranking_late_share=2": "method.ranking_late_share must be a share from 0 to 1, got 2.",
    "method=hash_attention method.bits=33": "method.bits must be a positive multiple of 32, got",
    "method=hash_attention method.hidden=0": "method.hidden must be at least 1, got 0.",
    "method=hash_attention method.edge=-1": "method.edge must be at least 0, got -1.",
    "method=hash_attention method.steps=0": "method.steps must be at least 1, got 0.",
    "method=hash_attention method.step_queries=0": "method.step_queries must be at least 1, got 0.",
    "method=hash_attention method.step_keys=no": "method.step_keys must be a whole number, got",
    "method=hash_attention method.positives=0": "method.positives must be at least 1, got 0.",
    "method=hash_attention method.positive_weight=0": "method.positive_weight must be above 0,",
    "method=magicpig method.hash_bits=15": "method.hash_bits must be at most 14, got 15.",
    "method=magicpig method.num_tables=0": "method.num_tables must be at least 1, got 0.",
    "method=magicpig method.min_collisions=151": "method.min_collisions must be at most",
    "method=magicpig method.native_local=-1": "method.native_local must be at least 0, got -1.",
    # The others.
    "method=quest method.page_size=16.5": "method.page_size must be a whole number, got 16.5.",
    "method=quest method.page_size=0": "method.page_size must be at least 1, got 0.",
    "method=loki method.rank=0": "method.rank must be at least 1, got 0.",
    "method=sparq method.rank=9999": "method.rank must be at most head_dim=64, got 9999.",
    "task=decode_latency method=sparq method.rank=129": "method.rank must be at most head_dim=128,",
    "method=pqcache method.parts=3": "method.parts must divide head_dim=64, got 3.",
    "method=double_sparsity method.channels=65": "method.channels must be at most head_dim=64, got",
    "method=twilight method@method.base=loki method.base.rank=65": (
        "method.base.rank must be at most head_dim=64, got 65."
    ),
    "method=sparq method.rank=true": "method.rank must be a whole number or null, got true.",
    "method=sparq method.mean_value=null": "method.mean_value must be true or false, got null.",
    "method=sparq method.local_share=1.5": "method.local_share must be a share from 0 to 1, got",
    "method=double_sparsity method.channels=0": "method.channels must be at least 1, got 0.",
    "method=double_sparsity method.label_bits=8": "method.label_bits must be one of 4, 16, got 8.",
    "method=double_sparsity method.label_scope=head": (
        "method.label_scope must be one of kv_head, query_head or null, got 'head'."
    ),
    "method=double_sparsity method.calibration_queries=0": (
        "method.calibration_queries must be at least 1, got 0."
    ),
    "method=infinigen method.partial_ratio=0": "method.partial_ratio must be a share above 0 and",
    "method=infinigen method.alpha=-1": "method.alpha must be above 0, got -1.",
    "method=pqcache method.parts=0": "method.parts must be at least 1, got 0.",
    "method=pqcache method.bits=9": "method.bits must be at most 8, as a code is one byte, got 9.",
    "method=pqcache method.iterations=many": "method.iterations must be a whole number, got",
    "method=pqcache method.sinks=-1": "method.sinks must be at least 0, got -1.",
    "method=pqcache method.local_share=1": "method.local_share must be a share from 0 to 0.75,",
    "method=snapkv method.window=65": "method.window must be at most 64, the queries that are",
    "method=snapkv method.kernel=4": "method.kernel must be odd, got 4.",
    "method=snapkv method.pooling=mean": "method.pooling must be one of avg, max, got 'mean'.",
    "method=h2o method.heavy_share=1": "method.heavy_share must be from 0 to below 1",
    "method=h2o method.mode=free": "method.mode must be one of masked, compact, got 'free'.",
    "method=spatten method.last_keep=0": "method.last_keep must be above 0 and at most 1, got 0.",
    "method=spatten method.last_heads=2": "method.last_heads must be above 0 and at most 1, got 2.",
    "method=spatten method.requantise_below=0": "method.requantise_below must be above 0 and at",
    "method=twilight method.base_k=0": "method.base_k must be at least 1, got 0.",
    "method=twilight method.p=0": "method.p must be above 0 and at most 1, got 0.",
    "method=twilight method.base=loki": "method.base must be a method, got 'loki'; name one by met",
    "method=twilight method@method.base=full": "method.base must be another method that selects,",
    "method=twilight method@method.base=loki method.base.rank=0": (
        "method.base.rank must be at least 1, got 0."
    ),
    "method=twilight method.base.page_size=big": "method.base.page_size must be a whole number,",
    "method=twilight +method.base.pages=2": "there is no setting method.base.pages",
    "method=full method.backend=cuda": "method.backend must be one of auto, sdpa, cpu, triton,",
    # Calibration texts and the tracker.
    "calibration.seed=-1": "calibration.seed must be at least 0, got -1.",
    "calibration.num_sequences=0": "calibration.num_sequences must be at least 1, got 0.",
    "calibration.max_length=4k": "calibration.max_length must be a whole number, got '4k'.",
    "calibration=text calibration.files=a.txt": (
        "calibration.files must be a list of texts or null, got 'a.txt'; brackets make a list"
    ),
    "calibration=mixed calibration.num_sequences=1": "calibration.num_sequences must be at least 2",
    "calibration=mixed calibration.seed=-1": "calibration.seed must be at least 0, got -1.",
    "calibration=mixed calibration.max_length=1": "calibration.max_length must be at least 2, got",
    "calibration=mixed calibration.files=[no.txt]": "calibration.files must be files, found none",
    "calibration=text calibration.files=[]": "calibration.files must list at least one value, got",
    "calibration=text calibration.files=[no.txt]": "calibration.files must be files, found none at",
    # Where a sweep runs.
    "launcher=joblib launcher.workers=0": "launcher.workers must be at least 1, got 0.",
    "launcher=submitit_slurm launcher.cluster=pbs": (
        "launcher.cluster must be one of slurm, local, got 'pbs'."
    ),
    "launcher=submitit_local launcher.workers=many": (
        "launcher.workers must be a whole number, got 'many'."
    ),
    "launcher=submitit_slurm launcher.at_once=0": "launcher.at_once must be at least 1, got 0.",
    "launcher=submitit_slurm launcher.partition=7": (
        "launcher.partition must be text or null, got 7; quotes inside quotes make it text"
    ),
    "launcher=submitit_slurm launcher.time_min=0": "launcher.time_min must be at least 1, got 0.",
    "launcher=submitit_slurm launcher.signal_s=14400": (
        "launcher.signal_s must be less than the 14400 s of time_min, got 14400."
    ),
    "launcher=submitit_slurm launcher.most_requeues=-1": (
        "launcher.most_requeues must be at least 0, got -1."
    ),
    "launcher=submitit_slurm launcher.gpus=-1": "launcher.gpus must be at least 0, got -1.",
    "launcher=submitit_slurm launcher.cpus=0.5": "launcher.cpus must be a whole number, got 0.5.",
    "launcher=submitit_slurm launcher.memory_gib=0": (
        "launcher.memory_gib must be at least 1, got 0."
    ),
    "launcher=submitit_slurm launcher.setup=module": (
        "launcher.setup must be a list of texts, got 'module'; brackets make a list"
    ),
    "launcher=submitit_slurm launcher.more=account": (
        "launcher.more must be a mapping, got 'account'"
    ),
    "launcher=ray launcher.workers=0": "launcher.workers must be at least 1, got 0.",
    "launcher=ray launcher.address=7": "launcher.address must be text or null, got 7",
    "launcher=ray launcher.cpus=0": "launcher.cpus must be at least 1, got 0.",
    "launcher=ray launcher.gpus=half": "launcher.gpus must be a whole number, got 'half'.",
    # What a search is; its knobs are tried below.
    "search=optuna search.trials=0": "search.trials must be at least 1, got 0.",
    "search=optuna search.batch=many": "search.batch must be a whole number, got 'many'.",
    "search=optuna search.seed=-1": "search.seed must be at least 0, got -1.",
    "search=optuna search.objectives=score": (
        "search.objectives must be a list of texts, got 'score'; brackets make a list"
    ),
    "search=optuna search.objectives=[]": (
        "search.objectives must be one or two different columns, got []."
    ),
    "search=optuna search.objectives=[score,score]": (
        "search.objectives must be one or two different columns, got ['score', 'score']."
    ),
    "search=optuna search.objectives=[decode_ms_p50]": (
        "search.objectives must be among score, delta_full, turn_change, cut_off_share,"
    ),
    "search=optuna search.knobs=k": "search.knobs must be a mapping, got 'k'.",
    "search=optuna search.knobs={}": "search.knobs must have at least one setting, as in",
    "search=optuna search.knobs.k=64": "search.knobs.k must be values to search, as in 32,64 or",
    "search=none +search.trials=3": "there is no setting search.trials",
    # Where a sweep runs, and what it leaves.
    "launcher=local +launcher.workers=2": "there is no setting launcher.workers",
    "tracker.project=1": "tracker.project must be text, got 1; quotes",
    "tracker.project=": "tracker.project must not be empty.",
    "tracker.entity=": "tracker.entity must not be empty; null is the account's default.",
    "tracker.entity=[me]": "tracker.entity must be text or null, got ['me'].",
    "tracker.artifact_mib=-1": "tracker.artifact_mib must be at least 0, got -1.",
    "tracker.mode=foo": "tracker.mode must be one of auto, online, offline, ",
    "report.models=8B": "report.models must be a list of texts or null, got '8B'; brackets",
    "report.models=[8B]": "report.models must be NAME=PARAMETERS/LAYERS",
    "report.published=maybe": "report.published must be true or false, got 'maybe'.",
    "tracker=none +tracker.mode=offline": "there is no setting tracker.mode",
}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    base.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(load, "AutoTokenizer", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@cache
def base(*choices: str) -> DictConfig:
    return compose("config", overrides=list(choices))


def composed(line: str) -> Composed:
    """Return what a command line stands for; Hydra composes each choice of options once."""
    overrides = OverridesParser.create().parse_overrides(line.split(" "))
    chosen = [one for one in overrides if one.key_or_group in GROUPS or one.package]
    config = copy.deepcopy(base(*(str(one.input_line) for one in chosen)))
    with open_dict(config):
        for one in overrides:
            if one not in chosen:
                OmegaConf.update(config, one.key_or_group, one.value(), merge=False)
    return command.checked(config, [one.key_or_group for one in overrides])


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_one_sentence_that_names_the_setting(line: str) -> None:
    with pytest.raises(SettingsError) as refused:
        composed(line)
    text = str(refused.value)
    assert text.startswith(BAD[line])
    assert "\n" not in text


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration's file, with what stands there."""
    for name, value in node.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict) and value and "_target_" not in value and here not in FREE:
            yield from leaves(value, here)
        elif name not in ("_target_", "defaults"):
            yield here, value


FREE = (
    *("model.architecture", "model.chat_template_kwargs", "model.config_overrides"),
    *("search.knobs", "launcher.more", "method.words", "task.metadata", "task.revisions"),
)
"""Mappings whose keys are those of transformers, a model's template, other settings, sbatch, a
task of lm-eval, and the hub."""
FILES = [(group, path) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def settings_of(group: str, path: Path) -> list[tuple[str, Any]]:
    node: Any = OmegaConf.to_container(OmegaConf.load(path))
    return list(leaves(node, group))


def test_every_setting_has_a_bad_line() -> None:
    known = {"protocol.k"}
    top: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    known |= {name for name in top if name not in ("defaults", "hydra")}
    for group, path in FILES:
        # A setting that follows another one is checked with that one.
        known |= {
            name for name, value in settings_of(group, path) if not str(value).startswith("${")
        }
    tried = {one.split("=")[0].lstrip("+") for line in BAD for one in line.split(" ") if "=" in one}
    assert known - tried == set()
    assert len(BAD) > 100


@pytest.mark.parametrize(("group", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_each_setting_of_each_file_has_a_type(group: str, path: Path) -> None:
    """Whatever stands there, a mapping of nothing known is refused, and a list of mappings."""
    given = ["model.name=a", "model.path=tiny"] if path.stem == "local" else []
    config = base(f"{group}={path.stem}", *given)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    written: Any = OmegaConf.to_container(config)
    check(Names(written), resolved)
    for name, value in settings_of(group, path):
        if name in FREE:
            continue
        for wrong in ({"nothing": 1}, [{"nothing": 1}]):
            settings = copy.deepcopy(resolved)
            *places, last = name.split(".")
            node = settings
            for place in places:
                node = node[place]
            node[last] = wrong
            expected = value[2:-1] if str(value).startswith("${") else name
            with pytest.raises(SettingsError) as refused:
                check(Names(written), settings)
            words = ("there is no setting ", f"{expected}.nothing")
            text = str(refused.value)
            assert text.startswith(f"{expected} must be ") or all(one in text for one in words)


@pytest.mark.parametrize(("group", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_each_option_is_accepted(group: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: object())  # accelerate
    line = f"{group}={path.stem}"
    if group == "model" and path.stem != "tiny":
        line += " model.path=tiny" if not path.stem.startswith("random") else ""
        line += " model.name=a" if path.stem == "local" else ""
        line += " model.gguf_file=null" if path.stem == "smollm2_135m" else ""
        line += " task=decode_throughput"
    if path.stem == "lm_eval":  # which names no task by default, and reads those that are named
        line += " task.names=gsm8k"
        monkeypatch.setattr(lm_eval, "load", lambda *given: [])
    assert composed(line).settings["k"] == 512


GOOD = [
    "impl={hamming_score:reference,topk_select:cpu}",
    "protocol.dense_layers=1",
    "protocol.dense_layers=[1,3]",
    'protocol.dense_layers="::2"',
    "protocol.num_sink=0 protocol.num_recent=0 k=1",
    "method.sigma=1 method.epsilon=0",
    "method=loki method.rank=null",
    "method=twilight method@method.base=hata method.base.rbit=64",
    "method.label=null method.colour=null method.words=null",
    'model.name="7"',
    "model.window=100000 task.length=20000",
    "task=selection task.num_samples=5",
    "task=selection num_samples=5 task.num_samples=3",
    "task=decode_latency task.batch_sizes=[4] task.lengths=[]",
    "task=decode_latency task.budget=1",
    "task=decode_latency task.budget=null k=64",
    "task=decode_latency method=sparq method.rank=128",
    "experiment_name=a/b",
    "experiment_name=",
    "impl=cpu",
    "prefill_memory_gib=0 calibration_memory_gib=0.5",
    "+point={rbit:64} rbit=${point.rbit}",
]


@pytest.mark.parametrize("line", GOOD)
def test_a_good_line_is_accepted(line: str) -> None:
    composed(line)


def test_a_reference_is_named_by_what_the_user_sets() -> None:
    with pytest.raises(SettingsError, match=r"^point\.rbit must be a whole number, got 'many'\.$"):
        composed("+point={rbit:many} rbit=${point.rbit}")


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process; return its exit status and its lines of errors."""

    def not_reached(*arguments: Any) -> None:
        raise AssertionError("nothing must be run")

    monkeypatch.setattr(Runner, "run", not_reached)
    monkeypatch.setenv("TOPKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run_once(*arguments: str) -> tuple[Any, list[str]]:
        monkeypatch.setattr(sys, "argv", ["topkbench", *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            command.main()
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    environment = dict(os.environ)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield run_once
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    GlobalHydra.instance().clear()


ONE_OPTION = (
    "error: {0} must name one option, as in {0}=NAME, got {1}; with -m, commas separate several."
)
COMMANDS = {
    "k=sixty": ["error: k must be a whole number, got 'sixty'."],
    "k=sixty,0 rbit=32,64 -m": [
        "error: k must be a whole number, got 'sixty'.",
        "error: k must be at least 1, got 0.",
    ],
    'protocol.dense_layers="100:"': [
        "error: protocol.dense_layers must reach a layer, and '100:' reaches none of 4; 0 leaves no"
        " layer dense."
    ],
    "foo=1 -m": ["error: there is no setting foo."],
    "method=hatta": None,
    "model=local": ["error: model.name must be given."],
    "results_dir=7": None,
    # Groups.
    "model=null": [ONE_OPTION.format("model", "model=null")],
    "task=": [ONE_OPTION.format("task", "task=")],
    "protocol=5": [ONE_OPTION.format("protocol", "protocol=5")],
    "~method": [ONE_OPTION.format("method", "~method")],
    "method=[hata,quest] -m": [ONE_OPTION.format("method", "method=[hata,quest]")],
    "+experiment=null": [ONE_OPTION.format("experiment", "+experiment=null")],
    "hydra/launcher=joblib": [
        "error: hydra/launcher must be basic, got 'joblib': cells share prompts, and Hydra's"
        " launchers run each by itself; launcher= says where a sweep runs (joblib, local, ray,"
        " submitit_local, submitit_slurm)."
    ],
    # What Hydra reads, merges and resolves.
    "foo": ["error: a setting must be NAME=VALUE, got 'foo'."],
    "=5": ["error: a setting must be NAME=VALUE, got '=5'."],
    "method.colour=#12": [
        "error: method.colour must be NAME=VALUE with a value that Hydra can read, got"
        " 'method.colour=#12'; quotes inside quotes make any value text: 'method.colour=\"#12\"'."
    ],
    "k=1,2": [
        "error: k must be one value, got k=1,2; -m runs a sweep over several values, and brackets"
        " make a list: 'k=[1,2]'."
    ],
    "task=needle task.lengths={a:1}": ["error: task.lengths must be a list, got a mapping."],
    "task=selection task.budgets={a:1}": ["error: task.budgets must be a list, got a mapping."],
    "method.native=[]": ["error: method.native must be a mapping, got a list."],
    "~k": ["error: k must be given."],
    "k=???": ["error: k must be given."],
    "k=${foo}": ["error: k must refer to a setting that there is, got '${foo}'."],
    "~experiment_name": ["error: experiment_name must be given, as other settings refer to it."],
    "cache_dir=${oc.env:NOPE}": None,
    # What is compared with the method, and what the task makes of it.
    "full_backend=flash_attn": [
        "error: full_backend=flash_attn needs tensors on a cuda device, got cpu; use"
        " full_backend=sdpa."
    ],
    "task=fit method=exact": [
        "error: task=fit needs a method that learns, but exact with these settings learns nothing;"
        " choose another."
    ],
    "task=fit method=full": None,
    "task=fit method.weights=random": None,
    "experiment_name=../..": None,
    # A search.
    "experiment=search -m": [
        "error: a search starts from one configuration, and -m makes several; leave -m out."
    ],
    "experiment=search method=quest k=64": [
        "error: search.knobs must have a setting that the command line gives no value, got k."
    ],
    "experiment=search method=quest +search.knobs.rbit=[32,64]": [
        "error: search.knobs.rbit has no effect with method=quest; ~search.knobs.rbit takes it out."
    ],
    "experiment=search method=full": [
        "error: search.knobs.k has no effect with method=full; ~search.knobs.k takes it out."
    ],
    "experiment=search method=quest +search.knobs.method.pagesize=[8,16]": [
        "error: there is no setting method.pagesize; did you mean method.page_size."
    ],
    "experiment=search method=quest search.knobs.method.page_size=[8,16]": [
        "error: search.knobs.method is not among the knobs; + adds a setting, as in"
        " '+search.knobs.NAME=[VALUE,VALUE]'."
    ],
    "experiment=search search.knobs.k=[32]": [
        "error: search.knobs.k must be several values, got [32]."
    ],
    "experiment=search search.knobs.k='range(5,5)'": [
        "error: search.knobs.k must be several values, got 'range(5,5)'."
    ],
    "experiment=search search.knobs.k='range(5,'": [
        "error: search.knobs.k must be values that Hydra can read, as in 32,64 or range(16,513,16),"
        " got 'range(5,'."
    ],
    "experiment=search +search.knobs.method.sigma='tag(log,interval(0,1))'": [
        "error: search.knobs.method.sigma must begin above 0 to be logarithmic, got"
        " 'tag(log,interval(0,1))'."
    ],
    "experiment=search search.knobs.k=[2,4]": [
        "error: protocol.num_sink + num_recent must be at most k=2, got 4 + 8; raise k or"
        " lower them."
    ],
    "experiment=search +search.knobs.num_samples=[5,10]": [
        "error: search.knobs.num_samples must be a setting of the method or its protocol: all"
        " trials of a search have the same model, task and prompts."
    ],
    "experiment=search task=selection": [
        "error: k has no effect with task=selection and these settings; task.budgets=[16] sets the"
        " task's own."
    ],
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_bad_command_leaves_nothing(run: Any, tmp_path: Path, line: str) -> None:
    status, errors = run(*line.split(" "))
    assert status == command.REFUSED_STATUS == 2
    assert errors == COMMANDS[line] if COMMANDS[line] else len(errors) == 1
    assert all(one.startswith("error: ") for one in errors)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_list_of_cells_is_said_once(run: Any, tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "cells.json").write_text("{")
    status, (error,) = run("hydra.run.dir=fixed")
    assert status == 2
    assert error.startswith(f"error: {tmp_path}/fixed/cells.json must be a list of identities")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "fixed", tmp_path / "fixed" / "cells.json"]


def test_a_model_that_slides_is_refused_by_its_configuration(run: Any, tmp_path: Path) -> None:
    config = json.loads((load.SHIPPED["tiny"] / "config.json").read_text())
    changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = tmp_path / "sliding"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changed, "sliding_window": 64}))
    status, (error,) = run("model=local", "model.name=a", f"model.path={folder}")
    assert status == 2
    assert error.startswith(
        f"error: the model {folder} must attend to the whole past in at least one layer"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sliding"]
    # A window as long as the longest sequence is the whole past.
    assert load.read_shape("a", str(folder), window=64).geometry is not None


def test_a_folder_that_was_there_stays(run: Any, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert run("k=sixty")[0] == 2
    assert run("k=sixty", "-m")[0] == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "results"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_batch_system_that_ends_the_process_gets_a_sentence_and_the_signals_status(
    run: Any, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    signal.signal(number, signal.SIG_DFL)  # whatever the tests were started with
    monkeypatch.setattr(Runner, "run", lambda *given: os.kill(os.getpid(), number))
    assert run("method=exact", "tracker=none") == (
        status,
        ["error: interrupted; what was measured is kept, and the same command goes on."],
    )
    assert not list(Path("results").glob("sweep/*"))  # no cell was begun


@pytest.mark.parametrize("option", ["--foo", "-x", "--k=3"])
def test_an_unknown_option_is_one_sentence(run: Any, option: str) -> None:
    name = option.partition("=")[0]
    assert run("method=exact", option) == (
        2,
        [
            f"error: there is no option {name}; a setting has no dashes (NAME=VALUE), and --help"
            " lists the options."
        ],
    )


def test_a_signal_that_is_ignored_stays_ignored(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup starts a command."""
    monkeypatch.setattr(Runner, "run", lambda *given: sys.exit(5))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run("method=exact", "tracker=none") == (5, [])
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
