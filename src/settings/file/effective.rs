//! The settings in force, as a complete KubeProxyConfiguration.

use std::time::Duration;

use serde_json::{Value, json};

use super::{KIND, VERSION};
use crate::settings::{
    LogFormat, NodePortAddresses, OOM_SCORE_ADJ, ProxyMode, SYNC_PERIOD, Settings,
};

/// The name under which `/configz` shows the configuration, as with kube-proxy.
pub const GROUP: &str = "kubeproxy.config.k8s.io";

/// The settings of a command line, the configuration file having been applied to it. Every field
/// of v1alpha1 is there. Those that nftlet has no use for hold zero values, those of other modes
/// kube-proxy's defaults.
pub fn effective(args: &Settings) -> Value {
    let address = |address: Option<std::net::SocketAddr>| match address {
        Some(address) => address.to_string(),
        None => String::new(),
    };
    let text = |text: Option<&dyn ToString>| text.map(ToString::to_string).unwrap_or_default();
    let path = args.kubeconfig.as_ref().map(|path| path.display());
    let ranges: Vec<String> = match &args.nodeport_addresses().unwrap_or_default() {
        NodePortAddresses::Primary => vec!["primary".to_owned()],
        NodePortAddresses::Ranges(ranges) => ranges.iter().map(ToString::to_string).collect(),
    };
    let bridge = args.pod_bridge_interface.as_ref();
    let prefix = args.pod_interface_name_prefix.as_ref();
    json!({
        "apiVersion": VERSION,
        "bindAddress": args.bind_address.map_or("0.0.0.0".to_owned(), |ip| ip.to_string()),
        "bindAddressHardFail": args.bind_address_hard_fail,
        "clientConnection": {
            "acceptContentTypes": "",
            "burst": 0,
            "contentType": "",
            "kubeconfig": text(path.as_ref().map(|path| path as &dyn ToString)),
            "qps": 0,
        },
        "clusterCIDR": args.cluster_cidr.to_string(),
        "configSyncPeriod": "15m0s",
        "conntrack": conntrack(args),
        "detectLocal": {
            "bridgeInterface": text(bridge.map(|name| name as &dyn ToString)),
            "interfaceNamePrefix": text(prefix.map(|name| name as &dyn ToString)),
        },
        "detectLocalMode": args.detect_local_mode.to_string(),
        "enableProfiling": false,
        "healthzBindAddress": address(args.healthz_address()),
        "hostnameOverride": args.hostname_override.clone().unwrap_or_default(),
        "iptables": {
            "localhostNodePorts": true,
            "masqueradeAll": false,
            "masqueradeBit": 14,
            "minSyncPeriod": "1s",
            "syncPeriod": "30s",
        },
        "ipvs": {
            "excludeCIDRs": null,
            "minSyncPeriod": "0s",
            "scheduler": "",
            "strictARP": false,
            "syncPeriod": "0s",
            "tcpFinTimeout": "0s",
            "tcpTimeout": "0s",
            "udpTimeout": "0s",
        },
        "kind": KIND,
        "logging": {
            "flushFrequency": "0s",
            "format": match args.log_format {
                LogFormat::Text => "text",
                LogFormat::Json => "json",
            },
            "options": {
                "json": {"infoBufferSize": "0"},
                "text": {"infoBufferSize": "0"},
            },
            "verbosity": verbosity(args.verbosity()),
        },
        "metricsBindAddress": address(args.metrics_address()),
        "mode": ProxyMode::Nftables.to_string(),
        "nftables": {
            "masqueradeAll": args.masquerade_all,
            "masqueradeBit": args.masquerade_bit,
            "minSyncPeriod": "0s",
            "syncPeriod": go(args.sync_period.unwrap_or(SYNC_PERIOD)),
        },
        "nodePortAddresses": ranges,
        "oomScoreAdj": args.process.oom_score_adj.unwrap_or(OOM_SCORE_ADJ),
        "portRange": "",
        "showHiddenMetricsForVersion": "",
        "winkernel": {
            "enableDSR": false,
            "forwardHealthCheckVip": false,
            "networkName": "",
            "rootHnsEndpointName": "",
            "sourceVip": "",
        },
    })
}

/// Returns the settings of connection tracking. Zero leaves the kernel's value.
fn conntrack(args: &Settings) -> Value {
    let asked = &args.conntrack;
    let period = |period: Option<Duration>| go(period.unwrap_or_default());
    json!({
        "maxPerCore": asked.max_per_core(),
        "min": asked.conntrack_min,
        "tcpBeLiberal": asked.conntrack_tcp_be_liberal,
        "tcpCloseWaitTimeout": go(asked.tcp_close_wait()),
        "tcpEstablishedTimeout": go(asked.tcp_established()),
        "udpStreamTimeout": period(asked.conntrack_udp_timeout_stream),
        "udpTimeout": period(asked.conntrack_udp_timeout),
    })
}

/// The verbosity of kube-proxy that shows about as much as so many `-v`.
fn verbosity(verbose: u8) -> u8 {
    match verbose {
        0 => 0,
        1 => 4,
        2 => 6,
        3.. => 8,
    }
}

/// A duration as Go writes it, to the millisecond.
fn go(duration: Duration) -> String {
    let (all, millis) = (duration.as_secs(), duration.subsec_millis());
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    let seconds = match millis {
        0 => format!("{seconds}s"),
        _ if all == 0 => return format!("{millis}ms"),
        _ => format!("{seconds}.{millis:03}s"),
    };
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, _) => format!("{minutes}m{seconds}"),
        _ => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{duration, verbosity_of};

    #[test]
    fn durations_are_written_as_go_does_and_read_back() {
        for (text, wanted) in [
            ("0", "0s"),
            ("15m", "15m0s"),
            ("24h", "24h0m0s"),
            ("1h30m5s", "1h30m5s"),
            ("90s", "1m30s"),
            ("250ms", "250ms"),
            ("1s 500ms", "1.500s"),
        ] {
            let read = duration(text).expect("a duration");
            assert_eq!(go(read), wanted);
            assert_eq!(duration(wanted), Ok(read), "{wanted}");
        }
    }

    #[test]
    fn verbosities_survive_being_written() {
        for verbose in 0..=3 {
            assert_eq!(verbosity_of(verbosity(verbose).into()), verbose);
        }
    }
}
