//! From `login` to a proxied call to `logout`.

use crate::rig::{Rig, code, json};

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_flow_from_login_to_logout() {
    let mut rig = Rig::start().await;
    let refused = rig.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    assert_eq!(rig.status_of("default").await["state"], "none");

    rig.log_in("default").await;
    assert_eq!(rig.status_of("default").await["state"], "fresh");
    assert_eq!(rig.get("/v2/profiles").await.status(), 200);

    rig.stop_sidecar().await;
    rig.start_sidecar().await;
    assert_eq!(rig.get("/v2/profiles").await.status(), 200, "a restart keeps the grant");

    assert_eq!(rig.post("/api/auth/amazon/logout").await.status(), 204);
    let refused = rig.get("/v2/profiles").await;
    assert_eq!((refused.status().as_u16(), code(&refused)), (401, "login_required"));
    let problem = json(refused).await;
    assert!(problem["next_step"].as_str().unwrap().contains("/api/auth/amazon/login?user_id=default"));
}
