//! Shows the consent page: in a browser where there is one, else as a URL with the way to the callback's port.

use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the command runs, as far as the way of a browser to it is concerned.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// A machine with a desktop.
    Desktop,
    /// A shell over ssh.
    Ssh,
    /// A Kubernetes pod.
    Pod,
    /// Another container.
    Container,
    /// A machine without a desktop.
    Console,
}

/// The namespace of a pod.
const NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// Opens the browser, or prints how to get one there. `port` is the port of localhost to which Amazon sends it back.
pub(super) fn show(auth_url: &str, port: Option<u16>, no_browser: bool) {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let place = place(variable, |path| Path::new(path).exists());
    let mut text = match place {
        Place::Desktop if !no_browser && open(auth_url) => {
            format!("a browser was opened; if you do not see it, open this URL:\n\n  {auth_url}\n\n")
        }
        _ => format!("open this URL in a browser and consent:\n\n  {auth_url}\n\n"),
    };
    if let Some(tunnel) = port.and_then(|port| tunnel(&place, port, variable)) {
        text += &format!("for a browser on your own machine, run this there first:\n\n  {tunnel}\n\n");
    }
    text += match port {
        Some(_) => "if the browser cannot show the last page, paste its URL here.\n",
        None => "then paste the URL of the page on which the browser ends here.\n",
    };
    // Nothing is left to say where the output is closed.
    let _ = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
}

fn place(variable: impl Fn(&str) -> Option<String>, exists: impl Fn(&str) -> bool) -> Place {
    let has = |name: &str| variable(name).is_some();
    if has("KUBERNETES_SERVICE_HOST") {
        Place::Pod
    } else if has("SSH_CONNECTION") || has("SSH_TTY") || has("SSH_CLIENT") {
        Place::Ssh
    } else if has("BROWSER") {
        Place::Desktop
    } else if exists("/.dockerenv") || exists("/run/.containerenv") || has("container") {
        Place::Container
    } else if cfg!(target_os = "macos") || has("DISPLAY") || has("WAYLAND_DISPLAY") {
        Place::Desktop
    } else {
        Place::Console
    }
}

/// The command that leads a browser elsewhere to `port` here.
fn tunnel(place: &Place, port: u16, variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    let host =
        || variable("HOSTNAME").or_else(|| Some(std::fs::read_to_string("/etc/hostname").ok()?.trim().to_owned()));
    match place {
        Place::Ssh => {
            // "client-ip client-port server-ip server-port"
            let connection = variable("SSH_CONNECTION").unwrap_or_default();
            let mut words = connection.split(' ').skip(2);
            let server = words.next().filter(|server| !server.is_empty()).map(str::to_owned).or_else(host)?;
            let user = variable("USER").map(|user| user + "@").unwrap_or_default();
            let at = words.next().filter(|port| *port != "22").map(|port| format!(" -p {port}")).unwrap_or_default();
            Some(format!("ssh{at} -N -L {port}:localhost:{port} {user}{server}"))
        }
        Place::Pod => {
            let namespace = std::fs::read_to_string(NAMESPACE).ok().map(|name| format!(" -n {}", name.trim()));
            let pod = host().unwrap_or_else(|| "POD".to_owned());
            Some(format!("kubectl port-forward{} pod/{pod} {port}:{port}", namespace.unwrap_or_default()))
        }
        Place::Container | Place::Desktop | Place::Console => None,
    }
}

/// Starts the browser, and does not wait for it.
fn open(url: &str) -> bool {
    let named = env::var("BROWSER").ok().filter(|browser| !browser.is_empty());
    let opener = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let browser = named.unwrap_or_else(|| opener.to_owned());
    // `BROWSER` may be a list; the first entry is tried.
    let browser = browser.split(':').next().unwrap_or(opener);
    let quiet = Command::new(browser).arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    quiet.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(variables: &[(&str, &str)], files: &[&str]) -> Place {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        place(variable, |path| files.contains(&path))
    }

    #[test]
    fn ssh_a_pod_and_a_container_are_recognized_before_a_desktop() {
        let display = ("DISPLAY", ":0");
        assert_eq!(at(&[("SSH_CONNECTION", "1 2 3 4"), display], &[]), Place::Ssh);
        assert_eq!(at(&[("KUBERNETES_SERVICE_HOST", "10.0.0.1"), display], &["/.dockerenv"]), Place::Pod);
        assert_eq!(at(&[], &["/.dockerenv"]), Place::Container);
        assert_eq!(at(&[display], &[]), Place::Desktop);
        assert_eq!(at(&[("BROWSER", "firefox")], &[]), Place::Desktop);
    }

    #[test]
    fn the_line_for_the_way_there_is_complete() {
        let variable = |name: &str| match name {
            "SSH_CONNECTION" => Some("10.0.0.9 51000 10.0.0.5 2222".to_owned()),
            "USER" => Some("anna".to_owned()),
            "HOSTNAME" => Some("app-7d9".to_owned()),
            _ => None,
        };
        assert_eq!(tunnel(&Place::Ssh, 8001, variable).unwrap(), "ssh -p 2222 -N -L 8001:localhost:8001 anna@10.0.0.5");
        let pod = tunnel(&Place::Pod, 8001, variable).unwrap();
        assert!(pod.starts_with("kubectl port-forward") && pod.ends_with("pod/app-7d9 8001:8001"), "{pod}");
        assert_eq!(tunnel(&Place::Desktop, 8001, variable), None);
    }
}
