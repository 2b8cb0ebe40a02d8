#!/bin/bash
# sbatch examples/multi_gpu/slurm.sh, from the root of the repository and in an environment that has the package
#SBATCH --job-name=lightning-optim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --signal=SIGUSR1@90
# With GPUs: as many of them as tasks on each node, and trainer.devices the same number.
##SBATCH --gpus-per-node=1

# Lightning reads ranks and addresses from SLURM. At the signal it saves a checkpoint and puts the job back into the
# queue; the job then goes on from it.
srun lightning-optim fit --config examples/multi_gpu/nodes.yaml
