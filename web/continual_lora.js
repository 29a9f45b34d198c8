// 1. On the classic canvas, advanced widgets are folded away until "more settings" is pressed; Nodes
//    2.0 does that by itself.
// 2. Workflows saved when "auto" was the number 0 show auto.
import { app } from "../../scripts/app.js";

const isOurs = (node) => node.comfyClass?.startsWith("ContinualLora_");
const isLinked = (node, widget) =>
    node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

const MORE = {
    en: ["more settings", "fewer settings"],
    zh: ["更多设置", "收起设置"],
    ja: ["その他の設定", "設定を隠す"],
    ko: ["설정 더 보기", "설정 접기"],
    de: ["mehr Einstellungen", "weniger Einstellungen"],
    fr: ["plus de réglages", "moins de réglages"],
    es: ["más ajustes", "menos ajustes"],
};

function fold(node) {
    const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
    if (!advanced.length || !node.toggleAdvanced) return; // an older ComfyUI shows them all
    for (const widget of advanced) {
        widget.advanced = true;
        Object.defineProperty(widget, "hidden", {
            configurable: true,
            get: () => !LiteGraph.vueNodesMode && !node.showAdvanced && !isLinked(node, widget),
            set: () => {},
        });
    }
    const words = MORE[app.extensionManager?.setting?.get("Comfy.Locale")] ?? MORE.en;
    const button = node.addWidget("button", words[0], null, () => {
        node.toggleAdvanced();
        node.setSize([node.size[0], node.computeSize()[1]]);
    });
    // a node that is loaded or pasted may come with them shown, and ComfyUI's menu shows them, too
    Object.defineProperty(button, "label", {
        configurable: true,
        get: () => words[node.showAdvanced ? 1 : 0],
        set: () => {},
    });
    button.serialize = false;
    button.options.serialize = false;
    button.options.hidden = true; // in Nodes 2.0, which has a button of its own
    Object.defineProperty(button, "hidden", {
        configurable: true,
        get: () => !!LiteGraph.vueNodesMode,
        set: () => {},
    });
}

function sayAuto(node) {
    const declared = node.constructor.nodeData?.input?.optional ?? {};
    for (const widget of node.widgets ?? []) {
        if (declared[widget.name]?.[1]?.default !== "auto") continue;
        const value = String(widget.value ?? "").trim();
        widget.value = value === "" || Number(value) === 0 ? "auto" : value;
    }
}

app.registerExtension({
    name: "continual-lora",
    nodeCreated(node) {
        if (isOurs(node)) fold(node);
    },
    loadedGraphNode(node) {
        if (isOurs(node)) sayAuto(node);
    },
});
