"""Fine-tune a language model with a LoRA whose ranks are kept apart (ReSoRA-style).

python examples/resora_peft.py MODEL TEXT_FILE OUT_FOLDER      (pip install 'evolora[peft]')
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from evolora.regularizers import ResoraConfig, ResoraTrainerMixin

name, text, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), lora)
lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]


class RegularisedTrainer(ResoraTrainerMixin, Trainer):
    """The Trainer, whose training loss has one term more."""


trainer = RegularisedTrainer(
    model=model,
    args=TrainingArguments(output_dir=out, num_train_epochs=1, logging_steps=1, report_to=[]),
    train_dataset=[tokenizer(line, truncation=True, max_length=128) for line in lines],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    resora=ResoraConfig(weight=1e-2),
)
trainer.train()
trainer.save_model(out)  # a stock PEFT adapter: evolora inspect OUT_FOLDER --redundancy
