"Several machines for one student: the paper profile at a tiny size under torchrun on two nodes, one of which is lost."
import os, re, signal, socket, subprocess, sys, time
import numpy as np, pytest, soundfile as sf, torch
from transformers import HubertConfig, HubertModel
from distilltv import distill
from distilltv.encoders import load_encoder, save_encoder, weights_hash

TINY = dict(hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, hidden_dropout=0., attention_dropout=0.,
            activation_dropout=0., feat_proj_dropout=0.)   # no dropout: it is another one in each process

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def start_nodes(arguments, env, log):
    "Two torchrun agents of one process each, as `sbatch` starts one on each machine."
    port, nodes = free_port(), []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
                   "--nproc-per-node=1",
                   "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "distilltv.distill", *arguments]
        with open(log.with_suffix(f".{rank}"), "w", encoding="utf-8") as f:
            nodes.append(subprocess.Popen(command, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True))
    return nodes

def kill(node):
    "An agent and its process, as if their machine had lost power."
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(node.pid)], capture_output=True,
                              text=True).stdout.split()
    for pid in (node.pid, *map(int, children)):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    node.wait(30)

def flat(folder): return torch.cat([v.flatten().double() for v in load_encoder(folder).state_dict().values()])

def test_two_nodes_train_what_one_process_trains_and_one_may_be_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    torch.manual_seed(0)
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"teacher")
    for split in ("train", "dev-clean"):
        (tmp_path/"audio"/split).mkdir(parents=True)
        for i in range(4):
            sf.write(tmp_path/f"audio/{split}/{i}.wav", np.random.default_rng(i).normal(0, .1, 6000), 16_000)
    arguments = ["--profile", "paper", "--teacher", "music", "--steps", "150", "--set", "batch=4", "seconds=.25",
                 "precision=no", "lr=1e-3",
                 *(f"teachers.{d}={tmp_path}/teacher" for d in ("speech", "music")), f"audio.speech={tmp_path}/audio"]
    distill.main([*arguments, "--out", str(tmp_path/"one")])
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="lo")
    out, nodes = tmp_path/"two", []
    try:
        nodes = start_nodes([*arguments, "--out", str(out)], env, tmp_path/"lost")
        while not (out/"checkpoint.pt").exists():
            assert all(n.poll() is None for n in nodes), (tmp_path/"lost.0").read_text(encoding="utf-8")[-2000:]
            time.sleep(.02)
        kill(nodes[1])                         # one machine is gone; the other ends by itself
        assert nodes[0].wait(1800) != 0
        nodes = start_nodes([*arguments, "--out", str(out)], env, tmp_path/"again")
        codes = [n.wait(1800) for n in nodes]
    finally:
        for n in nodes: kill(n)
    said = (tmp_path/"again.0").read_text(encoding="utf-8")
    assert codes == [0, 0], said[-2000:]
    # at most the 50 steps since the last checkpoint
    assert int(re.search(r"continuing at step (\d+) of 150", said)[1]) in (50, 100)
    start, one, two = (flat(f) for f in (tmp_path/"runs/paper/base", tmp_path/"one", out))
    moved, apart = (one-start).norm(), (one-two).norm()
    # students are saved in half precision, which is most of it
    assert apart < .01*moved, (float(apart), float(moved))
    assert str(out) in said and str(out) not in (tmp_path/"again.1").read_text(encoding="utf-8").splitlines()
