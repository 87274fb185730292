"""What a user would write with TRL alone: the other side of scripts/bench/compare.py.

Reads its settings as JSON from the command line, and writes one line of metrics per step.
"""

import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

settings = json.loads(sys.argv[1])

# The tokenizer's own template, with the markers that TRL's assistant_only_loss needs.
CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


class Metrics(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            with open(settings["metrics"], "a") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


cuda = settings["device"] == "cuda"
quantization = None
if settings["method"] == "qlora":
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
    )
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
if not settings["text"]:
    tokenizer.chat_template = CHAT_TEMPLATE
rows = load_dataset("json", data_files=settings["data"], split="train")
if settings["pairs"]:  # each with the end of its turn, and no line break after it
    Trainer, Config = DPOTrainer, DPOConfig
    own = {"loss_type": list(settings["pairs"]), "loss_weights": list(settings["pairs"].values())}

    def render(row):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt} | {side: row[side][0]["content"] + "<|im_end|>" for side in ("chosen", "rejected")}

    rows = rows.map(render)
else:
    Trainer, Config = SFTTrainer, SFTConfig
    own = {"packing": settings["packing"], "assistant_only_loss": settings["loss_on"] == "assistant"}
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=torch.bfloat16 if cuda else torch.float32,
        quantization_config=quantization,
        device_map={"": 0} if cuda else {"": "cpu"},
    ),
    args=Config(
        output_dir=settings["output_dir"],
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        optim="adamw_torch_fused",
        weight_decay=0.0,
        seed=settings["seed"],
        max_length=settings["max_length"],
        **own,
        gradient_checkpointing=cuda,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    ),
    train_dataset=rows,
    processing_class=tokenizer,
    peft_config=LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=settings["dropout"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    callbacks=[Metrics()],
)
trainer.train()
