"""What is trained behind the cut: settings, plan, data, net, phases, losses and export."""
