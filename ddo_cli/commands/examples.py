"""Two lines or more of every command, for its --help and the pages of the docs."""

EXAMPLES = {
    "sample": (
        "ddo sample --seeds 0-49999 --format npz --out samples",
        "ddo sample --ckpt runs/quickstart --classes 3,5 --steps 40 sigma_max=20",
    ),
    "finetune-ddo": (
        "ddo finetune-ddo --rounds 4 --alpha 4 --beta 0.05",
        "ddo finetune-ddo --recipe cifar10-uncond --data images.zip --ckpt edm.safetensors --dry-run",
    ),
    "train-disc": (
        "ddo train-disc --ckpt runs/quickstart",
        "ddo train-disc --data images.zip --images 2000000 --select gain",
    ),
    "guide-sample": (
        "ddo guide-sample --dg-weight 2 --seeds 0-4095 --format npz",
        "ddo guide-sample --disc runs/quickstart-disc --diffrs --out rejected",
    ),
    "fid": (
        "ddo fid samples --ref images.zip --metrics fid,is,kid --uncertainty",
        "ddo fid runs/quickstart --num-images 4096",
    ),
    "stats": (
        "ddo stats images.zip --out images-stats.safetensors",
        "ddo stats images.zip --out images-stats.safetensors --features --metric fd_dinov2",
    ),
    "edit": (
        "ddo edit pictures --ckpt runs/quickstart --level 0.5,2",
        "ddo edit pictures --label 3 --num-images 16 --out edited",
    ),
    "analyze": (
        "ddo analyze --disc runs/quickstart-disc",
        "ddo analyze --what gain,nfe --steps-list 4,8,18 --dg-weight 1",
    ),
    "report": (
        "ddo report runs/quickstart",
        "ddo report runs/quickstart --out meeting.html",
    ),
    "data": (
        "ddo data pictures --out images.zip --size 64",
        "ddo data pictures --out images.zip --size 64 --crop pad --background white",
    ),
    "pretrain": (
        "ddo pretrain --data images.zip --images 2000000 --out runs/mine",
        "ddo pretrain --model-file my_net.py model.name=my-net",
    ),
    "encode": (
        "ddo encode images.zip --ckpt dit.safetensors --out latents",
        "ddo encode images.zip --ckpt var.safetensors --out tokens --num-images 10000",
    ),
    "train-classifier": (
        "ddo train-classifier --data images.zip --images 1000000",
        "ddo train-classifier --ckpt model.safetensors --precision bf16 --dry-run",
    ),
    "train-extractor": (
        "ddo train-extractor --data images.zip --out extractor.safetensors",
        "ddo train-extractor --data images.zip --held-out test.zip --images 200000 --out extractor.safetensors",
    ),
    "ema": (
        "ddo ema runs/digits32-edm2/round-01 --std 0.05 --out ema.safetensors",
        "ddo ema runs/digits32-edm2/round-01 --std 0.1 --at 1000000 --out ema.safetensors",
    ),
    "convert": (
        "ddo convert edm-cifar10-32x32-uncond-vp.pkl --out edm.safetensors --verify",
        "ddo convert 64x64_diffusion.pt --out adm.safetensors --dry-run",
    ),
    "export": (
        "ddo export runs/quickstart --out for-diffusers",
        "ddo export runs/mine --out finetuned.pkl --like edm-cifar10-32x32-uncond-vp.pkl",
    ),
    "push": (
        "ddo push runs/quickstart user/quickstart --dry-run",
        "ddo push runs/mine/round-02/best.safetensors user/mine --private --license cc-by-4.0",
    ),
    "info": ("ddo info runs/quickstart", "ddo info samples --json"),
    "recipes": ("ddo recipes quickstart --copy mine.yaml", "ddo recipes --keys"),
    "doctor": ("ddo doctor", "ddo doctor --json"),
}
